"""Write files atomically, and read weights without executing code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpm.core.errors import UserError, one_line, why
from hpm.core.retries import retried

StateDict = dict[str, Tensor]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

STALE = re.compile(r"\..+\.\d+\.tmp|\.tmp\w{6}")
REPLACED = re.compile(r"\.(.+)\.replaced")  # see replace_folder
META_FILE = "checkpoint.json"  # in a folder of shards, see hpm.weights.sharded


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file, flush it to disk, then rename it to `path`.

    The file is complete whenever it exists, and its permissions follow the umask. Raises UserError,
    leaving no file behind, if the disk is full or the folder is not writable.
    """
    temporary = temporary_path(path)
    try:
        retried(lambda: _write(temporary, path, write))
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(temporary: Path, path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if temporary.stat().st_mode != mode:  # safetensors creates files with mode 0600
        temporary.chmod(mode)
    os.replace(temporary, path)
    _flush_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """Where this process writes what it then renames to `path`; see `remove_stale`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_folder(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`. A folder of that name is removed; if the process is killed in
    between, `remove_stale` puts it back.

    Raises UserError if the disk fails.
    """
    try:
        replaced = path.with_name(f".{path.name}.replaced")
        if path.exists():
            os.replace(path, replaced)
        _flush_folder(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise disk_error(path, error) from error


def remove(path: Path) -> None:
    """Remove a file, or a folder, which disappears at once."""
    if path.is_dir():
        hidden = temporary_path(path)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_stale(*folders: Path) -> None:
    """Remove temporary files and folders of killed processes: ours and those of safetensors."""
    for folder in folders:
        for path in folder.glob(".*"):
            if (replaced := REPLACED.fullmatch(path.name)) and path.is_dir():
                if (folder / replaced[1]).exists():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    os.replace(path, folder / replaced[1])
            elif STALE.fullmatch(path.name):
                if path.is_file():
                    path.unlink(missing_ok=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Flush the names of a folder to disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def disk_error(path: Path, error: Exception) -> UserError:
    """A one-line error for a file that could not be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search(r"os error (28|122|27)\b|No space|File too large", str(error)):
        return UserError(
            f"{path} could not be written: no space left; make room, then run the same command "
            "again: complete files are kept"
        )
    reason = why(error) if isinstance(error, OSError) else one_line(error)
    return UserError(f"{path} could not be written: {reason}")


def new_file(out: Path, default: str) -> Path:
    """The file to write: `out`, or the one named `default` in it unless it has that suffix. Raises
    UserError if the file exists."""
    file = out if out.suffix == Path(default).suffix else out / default
    if file.exists():
        raise UserError(f"{file} exists: choose another --out")
    return file


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_tensors(path: Path, tensors: StateDict, meta: dict[str, Any]) -> None:
    """Write tensors and JSON into one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Older versions of transformers require the key "format".
    header = {"hpm": json.dumps(meta), "format": "pt"}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def read_tensors(
    path: Path, only: Collection[str] | None = None
) -> tuple[StateDict, dict[str, Any]]:
    """Read tensors and JSON from a safetensors file, or a PyTorch file without code.

    only: names of the tensors to read from a safetensors file (default: all).
    """
    _check_access(path)
    try:
        if path.suffix in TORCH_SUFFIXES:
            states = read_torch_file(path)
            return next(
                states[key] for key in ("state_dict", "model", *states) if key in states
            ), {}
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("hpm", "{}"))
            names = [name for name in file.keys() if only is None or name in only]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, meta
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_meta(path: Path) -> dict[str, Any]:
    """Read the JSON of a checkpoint without its tensors. Raises UserError if it is not one."""
    if path.is_dir():
        return read_folder_meta(path)[0]
    _check_access(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("hpm", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    check_meta(path, meta)
    return meta


def read_folder_meta(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(metadata, size in bytes of each file) of a checkpoint that is a folder. Raises UserError if
    it is not one."""
    file = path / META_FILE
    _check_access(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        meta, files = dict(content["meta"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(file, error) from None
    check_meta(path, meta)
    return meta, files


def read_torch_file(path: Path) -> dict[str, StateDict]:
    """All state dicts in a PyTorch file, by key; "" is the top level. Raises UserError if the file
    is damaged or contains code."""
    _check_access(path)
    try:
        _refuse_compressed(path)
        # Training scripts often store their arguments beside the weights as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: contains pickled code, which is not run, or is damaged{_which_code(error)}; "
            "convert it to safetensors if you trust it"
        ) from error
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can fail anywhere in PyTorch's reader
        raise _unreadable(path, error) from None
    nested = {"": content} | content if isinstance(content, dict) else {}
    states = {str(key): _tensors(value, path) for key, value in nested.items()}
    states = {key: state for key, state in states.items() if state}
    if not states:
        raise _unreadable(path, ValueError("no tensors in it"))
    return states


def _refuse_compressed(path: Path) -> None:
    """Refuse compressed archives, which may be zip bombs; PyTorch does not compress."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        declared = sum(item.file_size for item in archive.infolist())
    if declared > path.stat().st_size:
        raise ValueError(f"it would unpack to {declared / 1e9:.3g} GB")


def _tensors(content: Any, path: Path) -> StateDict:
    """The tensors of a dictionary. Refuses tensors that claim more memory than the file holds."""
    if not isinstance(content, dict):
        return {}
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _unreadable(path, ValueError(f"{name} is not a plain tensor"))
    return state


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: truncated or not a weights file ({one_line(error, 160)}); use another checkpoint"
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _which_code(error: pickle.UnpicklingError) -> str:
    """What PyTorch refused to run, if the error says so."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def check_meta(path: Path, meta: dict[str, Any]) -> None:
    if "step" not in meta:
        raise UserError(f"{path}: not a checkpoint of hpm pretrain")


def _check_access(path: Path) -> None:
    """Raise the actual reason; safetensors reports any unreadable file as missing."""
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {why(error)}") from None

"""Files of tensors: written atomically, loaded without executing anything, and pruned.

A checkpoint is one safetensors file: the tensors under `model.`, `teacher.`, `optimizer.` and
`rng.`, everything else as JSON in the file's header.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hpm.errors import UserError, counted, one_line, why

State = dict[str, Tensor]
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
STALE = re.compile(r"\..+\.\d+\.tmp|\.tmp\w{6}")


@dataclass
class Checkpoint:
    """Everything that a run needs to go on."""

    path: Path
    model: State
    teacher: State
    optimizer: State
    memory: State
    rng: State
    meta: dict[str, Any]  # step, config, architecture, statistics, what could not be read ...


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file, flush it to disk, then rename it to `path`.

    A file of that name is thus always whole, and has the permissions of any new file (by the
    umask). Raises UserError where the disk is full or the folder cannot be written to, and leaves
    nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if temporary.stat().st_mode != mode:  # safetensors makes files that only their owner reads
            temporary.chmod(mode)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_stale(*folders: Path) -> None:
    """Remove the temporary files that killed saves left in these folders: ours, and those that
    safetensors makes beside them."""
    for folder in folders:
        for path in folder.glob(".*"):
            if STALE.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def disk_error(path: Path, error: Exception) -> UserError:
    """One clear line for a file that could not be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search(r"os error (28|122|27)\b|No space|File too large", str(error)):
        return UserError(
            f"{path} could not be written: no space left; make room, then run the same command "
            "again: what is whole already is kept"
        )
    reason = why(error) if isinstance(error, OSError) else one_line(error)
    return UserError(f"{path} could not be written: {reason}")


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_tensors(path: Path, tensors: State, meta: dict[str, Any]) -> None:
    """Write tensors and JSON into one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Older versions of transformers refuse a file that does not name its framework.
    header = {"hpm": json.dumps(meta), "format": "pt"}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def read_tensors(path: Path) -> tuple[State, dict[str, Any]]:
    """Tensors and JSON of a safetensors file, or of a PyTorch file that holds no code."""
    _check_access(path)
    try:
        if path.suffix in TORCH_SUFFIXES:
            states = read_torch_file(path)
            return next(
                states[key] for key in ("state_dict", "model", *states) if key in states
            ), {}
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("hpm", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, without its tensors. Raises UserError."""
    _check_access(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("hpm", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    _check_meta(path, meta)
    return meta


def save_checkpoint(
    folder: Path, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer,
    meta: dict[str, Any], keep: int, memory: nn.Module | None = None,
) -> Path:  # fmt: skip
    """Write `step_00001234.safetensors` and remove all but the latest `keep`."""
    path = folder / f"step_{meta['step']:08d}.safetensors"
    write_checkpoint(path, model, teacher, optimizer, meta, memory)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def write_checkpoint(
    path: Path, model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer,
    meta: dict[str, Any], memory: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write everything that training goes on from.

    That includes the state of the global random generator. It is the same however often the run was
    interrupted: only the training itself may draw from that generator, loaders have their own.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if teacher is not None:
        tensors |= {f"teacher.{name}": t for name, t in teacher.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}|{kind}"] = value
    if memory is not None:
        tensors |= {f"memory.{name}": t for name, t in memory.state_dict().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, meta)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.safetensors"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whole. Raises UserError where the file is not one, or is damaged."""
    tensors, meta = read_tensors(path)
    _check_meta(path, meta)
    parts: dict[str, State] = {
        "model": {}, "teacher": {}, "optimizer": {}, "memory": {}, "rng": {},
    }  # fmt: skip
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return Checkpoint(path, **parts, meta=meta)


def restore(
    checkpoint: Checkpoint, model: nn.Module, teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer, memory: nn.Module | None = None,
) -> None:  # fmt: skip
    """Put everything back where it was."""
    load_exactly(model, checkpoint.model, checkpoint.path)
    if teacher is not None:
        load_exactly(teacher, checkpoint.teacher, checkpoint.path)
    if memory is not None:
        load_exactly(memory, checkpoint.memory, checkpoint.path)
    parameters = dict(model.named_parameters())
    for name, value in checkpoint.optimizer.items():
        parameter_name, _, kind = name.partition("|")
        parameter = parameters[parameter_name]
        # The fused kernel wants its step counters in float32 beside the parameter.
        optimizer.state[parameter][kind] = value.to(parameter.device, torch.float32)
    torch.set_rng_state(checkpoint.rng["cpu"])
    if "cuda" in checkpoint.rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint.rng["cuda"])


def load_exactly(module: nn.Module, state: State, path: Path) -> None:
    """Load a state of the same names and shapes; UserError names the first that differs."""
    problems = compare(module, state)
    if problems:
        raise UserError(f"{path}: of another architecture ({problems[0]}; {differ(problems)})")
    module.load_state_dict(state)


def differ(problems: list[str]) -> str:
    """How many tensors do."""
    return "1 tensor differs" if len(problems) == 1 else f"{len(problems)} tensors differ"


def load_initial(
    model: nn.Module, state: State, path: Path, partial: bool, unused: Sequence[str] = ()
) -> str:
    """Start from other weights: says how many tensors matched; refuses a partial load unless asked.

    unused: further tensors of the file, to be named as left over.

    A backbone file, whose names lack the `encoder.` in front, is an encoder without decoders.
    """
    own = model.state_dict()
    if "encoder.patch_embed.proj.weight" in own and "patch_embed.proj.weight" in state:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    matching = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    summary = f"{len(matching)} of {counted(len(own), 'tensor')} matched {path} "
    summary += f"({_by_part(own, matching)})"
    left = [*unused, *[name for name in state if name not in matching]]
    summary += f", {len(left)} left over: {_some(left)}" if left else ""
    if not matching:
        raise UserError(f"init: {summary}; it holds no weights of such a model")
    if len(matching) < len(own):
        missing = [n for n in own if n not in matching]
        summary += f", {len(missing)} not, the first {missing[0]}"
        if not partial:
            raise UserError(f"init: {summary}; pass --init-partial to start from those alone")
    model.load_state_dict(matching, strict=False)
    return summary


def _by_part(own: State, matching: State) -> str:
    """How many tensors of each part matched: `encoder 52 of 52, predictor none of 16`."""
    counts: dict[str, list[int]] = {}
    for name in own:
        count = counts.setdefault(name.partition(".")[0], [0, 0])
        count[0] += name in matching
        count[1] += 1
    return ", ".join(f"{part} {n or 'none'} of {total}" for part, (n, total) in counts.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def compare(module: nn.Module, state: State) -> list[str]:
    """What differs between a module's tensors and a state, a line each."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not known" for name in state if name not in own]
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            problems.append(f"{name} is {shapes}")
    return problems


def read_torch_file(path: Path) -> dict[str, State]:
    """Every state dict of a PyTorch file that holds no code: under its key, or under "" where it
    is the file itself. Raises UserError."""
    _check_access(path)
    try:
        _refuse_packed(path)
        # Training scripts keep their arguments beside the weights, in this container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds pickled code (or is damaged), which is never run{_which_code(error)}; "
            "convert it to safetensors where you trust it"
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


def _which_code(error: pickle.UnpicklingError) -> str:
    """What PyTorch refused to run, where it says so."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def _refuse_packed(path: Path) -> None:
    """PyTorch stores its archives unpacked: one that is not may grow to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        declared = sum(item.file_size for item in archive.infolist())
    if declared > path.stat().st_size:
        raise ValueError(f"it would unpack to {declared / 1e9:.3g} GB")


def _tensors(content: Any, path: Path) -> State:
    """The tensors of a dictionary, each of them whole: none claims more than its file holds."""
    if not isinstance(content, dict):
        return {}
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _unreadable(path, ValueError(f"{name} is no plain tensor"))
    return state


def _check_meta(path: Path, meta: dict[str, Any]) -> None:
    if "step" not in meta:
        raise UserError(f"{path}: not a checkpoint of hpm pretrain")


def _check_access(path: Path) -> None:
    """safetensors says of every file that cannot be opened that it is not there."""
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {why(error)}") from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: truncated or not a weights file ({one_line(error, 160)}); use another checkpoint"
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""Checkpoints of sharded runs: folders of safetensors files that all processes write together, by
`torch.distributed.checkpoint`.

    step_00001234.sharded/
        shard-00001-model-00001-of-00001.safetensors   each process's part of the tensors
        shard-00002-model-00001-of-00001.safetensors
        checkpoint.json                                what the header of a single file holds

The tensors have the names of a checkpoint in a single file, see `hpm.weights.checkpoint`. PyTorch's
default format is not used, because its metadata are pickled. Any number of processes can read a
folder, whatever number wrote it. `hpm.weights.shard_writer` writes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hpm.core import shards
from hpm.core.errors import UserError, one_line
from hpm.core.files import StateDict, read_folder_meta

# torch.distributed.checkpoint takes a second to import, so only what needs it does so.


def read_sharded(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """Read whole tensors and metadata of a folder, in one process.

    Raises UserError if a file of it is missing or damaged.
    """
    meta, shapes = _open(path)
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in shapes.items()}
    _load(path, tensors)
    return tensors, meta


def tensor_shapes(path: Path) -> StateDict:
    """The tensors of a checkpoint, a folder or a single file, on the meta device."""
    if path.is_dir():
        return _open(path)[1]
    found = {}
    with _readable(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            some = file.get_slice(name)[:0] if shape else file.get_tensor(name)  # has the dtype
            found[name] = torch.empty(shape, dtype=some.dtype, device="meta")
    return found


def read_into(path: Path, tensors: StateDict) -> None:
    """Read a checkpoint, a folder or a single file, into tensors that may be sharded. Each process
    reads only its shards of a folder, and one whole tensor after the other of a file."""
    if path.is_dir():
        _load(path, tensors)
        return
    with _readable(path), safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            shards.copy_whole(tensor, file.get_tensor(name))


def _open(path: Path) -> tuple[dict[str, Any], StateDict]:
    """(metadata, tensors on the meta device). Raises UserError if files are missing or truncated:
    PyTorch would leave what they held as it is."""
    meta, files = read_folder_meta(path)
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            problem = "truncated" if file.is_file() else "missing"
            raise UserError(f"{path}: {name} is {problem}; use another checkpoint")
    from torch.distributed import checkpoint as dcp

    with _readable(path):
        found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return meta, {
        name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
        for name, each in found.items()
        if isinstance(each, dcp.metadata.TensorStorageMetadata)
    }


def _load(path: Path, tensors: StateDict) -> None:
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    with _readable(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # no_dist: each process finds its parts by itself.
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as failed:
        error = next(iter(failed.failures.values()))[0]
        raise _damaged(path, error) from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: damaged ({one_line(error, 160)}); use another checkpoint")

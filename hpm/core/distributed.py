"""Several processes started by torchrun. No other file depends on torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpm.core.errors import UserError

Done = TypeVar("Done")

# The longest that a process waits for another one: measures and checkpoints are made by the main
# process alone, and a process that fails closes its connections, which ends the others at once.
TIMEOUT = timedelta(minutes=30)
# And for the main process alone, which trains the probes of frozen features.
PATIENCE = timedelta(days=7)
_store: dist.Store | None = None
_patient: dist.ProcessGroup | None = None


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this process's device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch sees no GPU: pass --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes while the block runs; does nothing for a single one."""
    global _store, _patient
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    _store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # Objects travel between CPUs: NCCL would put those of all processes on every GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=_store,
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
    except BaseException:
        reports_error()  # before the others see that the connection is lost
        raise
    finally:
        _patient = None
        dist.destroy_process_group()


@cache
def reports_error() -> bool:
    """Whether this process is the one that reports why all of them fail: the first to ask.

    When one process fails, the others fail after it, with the same error or because the connection
    to it is lost.
    """
    if _store is None:  # only the command line was read so far, and it is the same for all
        return int(os.environ.get("LOCAL_RANK", rank())) == 0
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return _store.add(f"hpm/failed/{attempt}", 1) == 1
    except RuntimeError:  # the process that held the store has failed itself, and reported that
        return False


def data_parallel(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over the processes."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def no_gradient_sync(model: nn.Module, last: bool) -> Any:
    """Context of a backward pass: gradients are exchanged only in the last of an accumulation."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def mean(values: Tensor) -> Tensor:
    """Mean over all processes, without gradients."""
    if not dist.is_initialized():
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size()


def differentiable_mean(values: Tensor) -> Tensor:
    """Mean over all processes; gradients flow back to the values of all of them."""
    if not dist.is_initialized():
        return values
    from torch.distributed.nn import functional

    return functional.all_reduce(values) / world_size()


def concatenate(values: Tensor) -> Tensor:
    """The values [batch ...] of all processes, one batch after the other, without gradients."""
    if not dist.is_initialized():
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def gather(value: Any) -> list[Any]:
    """The value of every process, in order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's value, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient)
    return values[0]


def wait_for_main() -> None:
    """Wait for what the main process does alone, before anything is exchanged between GPUs: their
    watchdog would take a long wait for a fault."""
    from_main(None)


def main_first(action: Callable[[], Done]) -> Done:
    """Do something in the main process alone; the others wait for what it returns, and fail with it
    if it fails."""
    done, problem, cause = None, None, None
    if is_main():
        try:
            done = action()
        except UserError as error:
            problem, cause = str(error), error.__cause__
    done, problem = from_main((done, problem))
    if problem:
        raise UserError(problem) from cause
    return done


def part_of(count: int) -> Tensor:
    """The items of this process among `count`: every n-th one."""
    return torch.arange(rank(), count, world_size())


def rows_of_all(values: Tensor) -> Tensor:
    """Rows [n ...] of all processes, one process after another, n being each one's own."""
    if not dist.is_initialized():
        return values
    counts = _counts(values)
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = concatenate(padded).unflatten(0, (len(counts), -1)) if max(counts) else [values]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=False)])


def rows_to_main(values: Tensor, ids: Tensor) -> Tensor:
    """Rows [n ...] of all processes by their ids [n], which rise within each process: all of them
    in the main process, none in the others.

    They travel as they are, one process after another: the main process holds the whole and at
    most one part twice.
    """
    if not dist.is_initialized():
        return values
    counts = _counts(ids)
    rows = rows_of_all(ids).argsort().argsort().split(counts)
    if not is_main():
        if len(values):
            dist.send(values.contiguous(), 0)
        return values[:0]
    whole = values.new_empty(sum(counts), *values.shape[1:])
    whole[rows[0]] = values
    for process, count in enumerate(counts[1:], 1):
        if count:
            part = values.new_empty(count, *values.shape[1:])
            dist.recv(part, process)
            whole[rows[process]] = part
    return whole


def _counts(values: Tensor) -> list[int]:
    """Number of rows in each process."""
    return concatenate(torch.tensor([len(values)], device=values.device)).tolist()

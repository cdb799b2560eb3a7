"""Communication between the processes started by torchrun.

Beside this file, only `shards`, `weights.sharded`, `weights.shard_writer` and `training.parallel`
use torch.distributed, for runs whose models are sharded.
"""

from __future__ import annotations

import itertools
import os
import resource
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
from hpm.core.signals import Interrupted

Done = TypeVar("Done")

# Timeout of collectives. Only the main process evaluates and saves, while the others wait. When a
# process fails, its connections close, which ends the others at once.
TIMEOUT = timedelta(minutes=30)
# Timeout of waiting for the main process, which also trains the probes of frozen features.
MAIN_TIMEOUT = timedelta(days=7)
# Each process is connected to each other one in each group: two, and one of `--shard`.
GROUPS = 3
OPEN_FILES = 1024  # beside connections; the limit of many systems, for all of them
_store: dist.Store | None = None
_group_numbers = itertools.count()
_main_group: dist.ProcessGroup | None = None


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


def need_one_process(verb: str) -> None:
    """Raise UserError where there are several processes, and the verb does not share its work."""
    if world_size() > 1:
        raise UserError(f"{verb} runs in one process: do not use torchrun")


def pick_device(name: str) -> torch.device:
    """This process's device for `auto`, `cpu`, `cuda` or `mps`."""
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device is mps, but PyTorch sees no Apple GPU: pass --device cpu")
        if world_size() > 1:
            raise UserError("device mps works in one process only: start hpm without torchrun")
        return torch.device("mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch sees no GPU: pass --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"process {number + 1} of this machine has no GPU, for PyTorch sees {count}: start as "
            f"many processes as there are GPUs (--nproc-per-node {count}), or pass --device cpu"
        )
    return torch.device("cuda", number)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group inside the context; does nothing with a single process."""
    global _store, _main_group
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    _store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    _allow_open_files(OPEN_FILES + GROUPS * count)
    # Objects are exchanged between CPUs; NCCL would copy those of all processes to every GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        # The store outlives the group: a later one would read the addresses of this one there.
        store=dist.PrefixStore(f"hpm/{next(_group_numbers)}", _store),
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    _main_group = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)
    ends_with_others = True
    try:
        yield
    except BaseException as error:
        reports_error()  # claim the report before the others lose their connections
        ends_with_others = isinstance(error, Interrupted)
        raise
    finally:
        _main_group = None
        # NCCL's connections are destroyed by all processes together. A process that has failed
        # would wait for others that wait for it, so it exits without, and torchrun ends the others.
        if ends_with_others or not on_gpu:
            dist.destroy_process_group()


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, if it is lower and as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


@cache
def reports_error() -> bool:
    """Whether this process should report the error: the first process to call this.

    When one process fails, the others fail too, with the same error or a lost connection.
    """
    if _store is None:  # an error in the command line, which all processes share
        return int(os.environ.get("LOCAL_RANK", rank())) == 0
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return _store.add(f"hpm/failed/{attempt}", 1) == 1
    except RuntimeError:  # the process that holds the store has failed, and has reported
        return False


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap the model to average its gradients over the processes."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def no_gradient_sync(model: nn.Module, last: bool) -> Any:
    """Context of a backward pass that synchronises gradients only if it is the last one."""
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
    """The values [batch ...] of all processes, concatenated by rank, without gradients."""
    if not dist.is_initialized():
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def gather(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(value: bool, device: torch.device) -> bool:
    """Whether the value is true in any process. Of a thousand on GPUs, this takes a fraction of a
    millisecond, and `gather`, in which objects pass from CPU to CPU, two rounds of all of them."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(float(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def from_main(value: Any) -> Any:
    """Broadcast the main process's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_main_group)
    return values[0]


def wait_for_main() -> None:
    """Wait for work of the main process on the CPU group. NCCL's watchdog would abort a long
    wait."""
    from_main(None)


def wait_for_all() -> None:
    """Wait until every process has come here, which may take days."""
    if dist.is_initialized():
        dist.barrier(group=_main_group)


def main_first(action: Callable[[], Done]) -> Done:
    """Run an action in the main process only. All processes return its result, or raise its
    UserError."""
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
    """Indices of this process's items among `count`: every n-th one."""
    return torch.arange(rank(), count, world_size())


def rows_of_all(values: Tensor) -> Tensor:
    """Rows [n ...] of all processes, concatenated by rank. n may differ between processes."""
    if not dist.is_initialized():
        return values
    counts = _counts(values)
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = concatenate(padded).unflatten(0, (len(counts), -1)) if max(counts) else [values]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=False)])


def rows_to_main(values: Tensor, ids: Tensor) -> Tensor:
    """Gather rows [n ...] of all processes in the main process, sorted by their ids [n]. The other
    processes return no rows.

    ids must increase within each process. The main process receives one part at a time, so that it
    needs little memory beyond the result.
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

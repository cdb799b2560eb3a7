"""Start and stop data loading workers."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hpm.core import distributed
from hpm.core.errors import UserError, counted
from hpm.core.signals import hold_stop_signals, ignore_stop_signals

FORKS = sys.platform == "linux"  # workers are forks of this process, and share its memory
SHARED = Path("/dev/shm")
# PyTorch's messages when shared memory is full, when a worker ends, and when one hangs.
OUT_OF_SHARED = re.compile(r"shared memory|Bus error|No space left on device")
ENDED = re.compile(r"DataLoader worker \(pid.*(?:killed by signal|exited unexpectedly)[^.]*")
HANGS = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
MAX_WORKERS = 16  # by default; each holds a few batches and keeps a core busy
_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    """At exit, Python sends SIGTERM to its children, which workers ignore, and then waits for them
    without a limit. Kill them instead."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


class WorkerLoader(DataLoader):
    """A DataLoader whose workers end with this process. Raises UserError if shared memory is full,
    or if a worker ends or hangs."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        others = set(multiprocessing.active_children())
        with worker_errors(self.num_workers):
            with hold_stop_signals():  # until the workers have started to ignore them
                batches = super().__iter__()
            _workers.update(set(multiprocessing.active_children()) - others)
            yield from batches


@contextmanager
def worker_errors(workers: int = 0) -> Iterator[None]:
    """Raise a UserError for what PyTorch says of workers that failed. It says that a worker ended
    by a signal handler, which interrupts whatever this process does.

    workers: their number, in a context in which only they use shared memory.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        ended = ENDED.search(text)
        if OUT_OF_SHARED.search(text) and (workers or ended):
            size = f" ({shutil.disk_usage(SHARED).total / 1e6:.0f} MB)" if SHARED.exists() else ""
            of = counted(workers, "loading worker") if workers else "the loading workers"
            raise UserError(
                f"{SHARED}{size} is too small for {of}: "
                "pass fewer --workers (0 does not use it), or enlarge it (in a container: "
                "docker run --shm-size=8g)"
            ) from None
        if ended:
            raise UserError(
                f"a loading worker ended ({ended[0]}), most often because memory ran out: pass "
                "fewer --workers or --cache false; the same command resumes from the last "
                "checkpoint"
            ) from None
        if hangs := HANGS.search(text):
            raise UserError(
                f"the loading workers have given nothing for {float(hangs[1]):.0f} seconds: the "
                "file system or server of the data does not answer; once it does, the same command "
                "resumes from the last checkpoint"
            ) from None
        raise


def batch_loader(
    samples: Dataset,
    steps: Iterable[Sequence[Any]],
    collate: Callable[[list[Any]], Any],
    workers: int = 0,
    **options: Any,
) -> WorkerLoader:
    """One collated batch per list of keys of `samples`.

    Workers are forks: they start quickly, and share source and cache instead of copying them. No
    other thread may draw from PyTorch's global generator while they start: a fork would copy the
    locked generator, and hang. On macOS, whose libraries do not survive a fork, they are spawned. A
    worker that yields no batch within `distributed.TIMEOUT` is an error.
    """
    return WorkerLoader(
        samples,
        batch_sampler=steps,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context=("fork" if FORKS else "spawn") if workers else None,
        timeout=distributed.TIMEOUT.total_seconds() if workers else 0,
        # A separate generator: DataLoader would otherwise draw from the global one at every start,
        # and a resumed run would differ.
        generator=torch.Generator(),
        **options,
    )


def num_workers(requested: int | None) -> int:
    """Number of data loading workers: `requested`, or by default one per spare core of this
    process, at least 1 and at most MAX_WORKERS."""
    if requested is not None:
        return requested
    return max(1, min(MAX_WORKERS, usable_cores() // distributed.processes_here() - 1))


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

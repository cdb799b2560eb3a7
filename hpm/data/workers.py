"""Starting and stopping the processes that load images."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hpm.core import distributed
from hpm.core.errors import UserError, counted
from hpm.core.signals import hold_stop_signals, ignore_stop_signals

FORKS = sys.platform == "linux"  # workers are copies of this process, and share its mappings
SHARED = Path("/dev/shm")
# What PyTorch says where the memory that loading processes share is full.
OUT_OF_SHARED = re.compile(r"shared memory|Bus error|No space left on device")
_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    """Python ends its children by SIGTERM, which loading workers ignore, and then waits for them:
    without limit for one that hangs."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


class WorkerLoader(DataLoader):
    """A loader whose workers end with this process. UserError where the memory that they share is
    full."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        others = set(multiprocessing.active_children())
        try:
            with hold_stop_signals():  # until the workers ignore them
                batches = super().__iter__()
            _workers.update(set(multiprocessing.active_children()) - others)
            yield from batches
        except (RuntimeError, OSError) as error:
            if not self.num_workers or not OUT_OF_SHARED.search(str(error)):
                raise
            size = f" ({shutil.disk_usage(SHARED).total / 1e6:.0f} MB)" if SHARED.exists() else ""
            raise UserError(
                f"{SHARED}{size} is too small for {counted(self.num_workers, 'loading worker')}: "
                "pass fewer --workers (0 does not use it), or enlarge it (in a container: "
                "docker run --shm-size=8g)"
            ) from None


def batch_loader(
    samples: Dataset,
    steps: Iterable[Sequence[Any]],
    collate: Callable[[list[Any]], Any],
    workers: int = 0,
    **options: Any,
) -> WorkerLoader:
    """One collated batch per list of keys of `samples`.

    Workers are forks: they start at once, and share source and cache instead of copying them. No
    other thread may draw from PyTorch's global generator meanwhile: a fork would copy its lock
    held, and hang (none of ours does). A worker that gives no batch in the time that processes
    wait for each other is an error.
    """
    return WorkerLoader(
        samples,
        batch_sampler=steps,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context="fork" if workers and FORKS else None,
        timeout=distributed.TIMEOUT.total_seconds() if workers else 0,
        # Its own: a loader would draw from the global one, whose state a checkpoint keeps, once
        # for each time that a run starts.
        generator=torch.Generator(),
        **options,
    )

"""Start and stop data loading workers."""

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

FORKS = sys.platform == "linux"  # workers are forks of this process, and share its memory
SHARED = Path("/dev/shm")
# PyTorch's messages when shared memory is full.
OUT_OF_SHARED = re.compile(r"shared memory|Bus error|No space left on device")
_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    """At exit, Python sends SIGTERM to its children, which workers ignore, and then waits for them
    without a limit. Kill them instead."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


class WorkerLoader(DataLoader):
    """A DataLoader whose workers end with this process. Raises UserError if shared memory is
    full."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        others = set(multiprocessing.active_children())
        try:
            with hold_stop_signals():  # until the workers have started to ignore them
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

    Workers are forks: they start quickly, and share source and cache instead of copying them. No
    other thread may draw from PyTorch's global generator while they start: a fork would copy the
    locked generator, and hang. A worker that yields no batch within `distributed.TIMEOUT` is an
    error.
    """
    return WorkerLoader(
        samples,
        batch_sampler=steps,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context="fork" if workers and FORKS else None,
        timeout=distributed.TIMEOUT.total_seconds() if workers else 0,
        # A separate generator: DataLoader would otherwise draw from the global one at every start,
        # and a resumed run would differ.
        generator=torch.Generator(),
        **options,
    )

"""Processes that load images: how they start, and how they end."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from hpm.core.errors import UserError, counted
from hpm.core.signals import hold_stop_signals

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
                "pass fewer --workers (0 needs none of it), or enlarge it (in a container: "
                "docker run --shm-size=8g)"
            ) from None

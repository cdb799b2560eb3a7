"""A cache of decoded images in memory that workers share, filled when an image is first read."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from hpm.core import distributed
from hpm.data.arrays import Pixels, UnreadableImage
from hpm.data.inspection import spaced
from hpm.data.sources import Source
from hpm.data.video.sources import holds_videos
from hpm.data.workers import FORKS

AUTO_SHARE, LARGEST_SHARE = 0.25, 0.8  # of the memory that is available
MEMINFO = Path("/proc/meminfo")  # on Linux
CONTAINER = Path("/sys/fs/cgroup")
SAMPLED = 32  # images decoded to estimate the size of a source
ENTRY = np.dtype(
    [
        ("start", "i8"),
        ("shape", "i4", 3),
        ("kind", "S3"),
        ("transparent", "?"),
        ("interleaved", "?"),
        ("filled", "?"),
    ]
)


class Cache:
    """Pixels by index. The system allocates the memory as it is written.

    Create it before the workers, which inherit it by fork. Images that do not fit are not cached.
    """

    def __init__(self, count: int, size: int):
        self.size = size
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8)
        self._table = np.frombuffer(mmap.mmap(-1, max(1, count) * ENTRY.itemsize), ENTRY)
        self._used = np.frombuffer(mmap.mmap(-1, 8), np.int64)
        self._lock = multiprocessing.get_context("fork").Lock()

    @property
    def used(self) -> int:
        """Bytes in use."""
        return int(self._used[0])

    def get(self, index: int, channels: int) -> Pixels | None:
        with self._lock:
            entry = self._table[index].copy()
        if not entry["filled"]:
            return None
        kind, start = np.dtype(entry["kind"].decode()), int(entry["start"])
        shape = tuple(map(int, entry["shape"]))
        data = self._memory[start : start + int(np.prod(shape)) * kind.itemsize]
        array = data.view(kind).reshape(shape)
        if entry["interleaved"]:
            array = array.transpose(2, 0, 1)
        return Pixels(array, channels, bool(entry["transparent"]))

    def put(self, index: int, pixels: Pixels) -> None:
        array = pixels.array
        # Interleaved channels stay interleaved: PyTorch resizes them faster.
        interleaved = array.strides[0] < array.strides[2]
        array = np.ascontiguousarray(array.transpose(1, 2, 0) if interleaved else array)
        with self._lock:
            start = self.used
            stop = start + -(-array.nbytes // 64) * 64
            if stop > self.size or self._table[index]["filled"]:
                return
            self._used[0] = stop
        self._memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        with self._lock:  # last, so that no worker reads a half-written image
            self._table[index] = (
                start,
                array.shape,
                array.dtype.str,
                pixels.transparent,
                interleaved,
                True,
            )


def make_cache(
    wanted: Literal["auto", "true", "false"], source: Source, decoded: Callable[[int], Pixels]
) -> Cache | None:
    """A cache for a source, or None if `wanted` is false or memory is short.

    With `auto`, only if all images fit into a quarter of the available memory. Videos are not
    cached: decoded, they are a hundred times as large as their files, and each epoch sees another
    clip.
    """
    if wanted == "false" or not FORKS or holds_videos(source):
        return None
    sizes = []
    for index in spaced(len(source), SAMPLED):
        with contextlib.suppress(UnreadableImage, OSError):
            sizes.append(decoded(index).array.nbytes)
    needed = int(1.1 * len(source) * float(np.mean(sizes))) if sizes else 0
    available = available_memory() // distributed.processes_here()
    if not needed or (wanted == "auto" and needed > AUTO_SHARE * available):
        return None
    with contextlib.suppress(OSError):  # without overcommitment, the system may refuse
        return Cache(len(source), min(2 * needed, int(LARGEST_SHARE * available)))
    return None


def total_memory() -> int:
    """Bytes of memory of this machine, or of this container if it has a limit. Raises ValueError or
    OSError where the system does not say."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER / "memory.max"
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def available_memory() -> int:
    """Bytes of free memory on this machine or in this container; of all memory where the system
    is not Linux."""
    if MEMINFO.exists():
        lines = MEMINFO.read_text().splitlines()
        known = {name: int(rest.split()[0]) * 1024 for name, rest in (x.split(":") for x in lines)}
        available = known["MemAvailable"]
    else:
        available = total_memory()
    with contextlib.suppress(OSError, ValueError):  # no limit
        limit = int((CONTAINER / "memory.max").read_text())
        available = min(available, limit - int((CONTAINER / "memory.current").read_text()))
    return max(0, available)

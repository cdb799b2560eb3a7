"""File paths: a compact list, and what sources of files have in common."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

BLOCK = 1 << 20  # paths


class Paths(Sequence[str]):
    """Paths in two arrays, which workers share. A list of strings would be copied into each worker
    page by page, as reference counts are written."""

    def __init__(self, paths: Iterable[Path | str]):
        names, ends = bytearray(), array("q")
        for path in paths:
            names += os.fsencode(path)
            names.append(0)
            ends.append(len(names))
        self._names, self._ends = np.frombuffer(names, np.uint8), np.array(ends, np.int64)
        self._root = ""

    @classmethod
    def of_names(cls, names: bytes | bytearray, ends: np.ndarray, root: str) -> Paths:
        """names: relative to `root`, or absolute; each with a zero byte behind it. ends: where the
        next one begins."""
        paths = cls([])
        paths._names, paths._ends, paths._root = np.frombuffer(names, np.uint8), ends, root
        return paths

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Paths(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        name = os.fsdecode(self._names[self._start(index) : int(self._ends[index]) - 1].tobytes())
        return os.path.join(self._root, name) if self._root else name

    def relative_to(self, root: str) -> Iterator[bytes]:
        """The paths, encoded, without `root` where they begin with it; a zero byte behind each. A
        million at a time."""
        prefix = os.fsencode(os.path.join(root, ""))
        for first in range(0, len(self), BLOCK):
            end = int(self._ends[min(first + BLOCK, len(self)) - 1])
            names = b"\0" + self._names[self._start(first) : end].tobytes()
            yield names.replace(b"\0" + prefix, b"\0")[1:]

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) if index else 0


class Files:
    """Files below `root`, which their names are relative to, with or without labels: what sources
    of files have in common."""

    def __init__(
        self,
        name: str,
        paths: Iterable[Path | str],
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        root: Path | str = "",
    ):
        self.name = name
        self.root = str(root)
        self.paths = paths if isinstance(paths, Paths) else Paths(paths)
        self.labels = labels
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

"""File paths: a compact list, and what sources of files have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np


class Paths(Sequence[str]):
    """Paths in two arrays, which workers share. A list of strings would be copied into each worker
    page by page, as reference counts are written."""

    def __init__(self, paths: Iterable[Path | str]):
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

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
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


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
        self.paths = Paths(paths)
        self.labels = labels
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

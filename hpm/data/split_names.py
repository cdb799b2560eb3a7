"""Which split of a data set is trained on, and which is tested on, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "valid", "test", "testing")


def train_and_test(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The names of the two splits; None for one that is not there. Validation comes before test,
    whose labels are often withheld, unless it is part of the training split (`trainval`)."""
    names = list(names)
    train = shortest_name(names, TRAIN_NAMES)
    with_val = train is not None and "val" in train.lower()
    wanted = [name for name in TEST_NAMES if not (with_val and name.startswith("val"))]
    tests = (shortest_name(names, (name,)) for name in wanted)
    return train, next((n for n in tests if n is not None), None)


def shortest_name(names: Iterable[str], beginnings: tuple[str, ...]) -> str | None:
    """The shortest name with such a beginning: `train` rather than `trainval` or `train_extra`."""
    found = [name for name in names if name.lower().startswith(beginnings)]
    return min(found, key=lambda name: (len(name), name), default=None)


def training_files(files: Sequence[Path], root: Path) -> list[Path]:
    """The files below `root` of the training split; none if no name says which they are."""
    return [file for file in files if _split_name(file, root).startswith(TRAIN_NAMES)]


def test_files(files: Sequence[Path], root: Path) -> list[Path]:
    """The files below `root` of the first test split that there is."""
    for name in TEST_NAMES:
        if found := [file for file in files if _split_name(file, root).startswith(name)]:
            return found
    return []


def _split_name(file: Path, root: Path) -> str:
    """The name that tells the split of a file: its own, or else that of the innermost folder below
    `root` that is called as a split is (`train`, `train2017`, `partial-train`); empty if none."""
    names = (*TRAIN_NAMES, *TEST_NAMES)
    # Whole words only: `testimony.parquet` and a folder `valley` are no splits.
    if (first := _words(file.stem)[0]) in (*names, "trainval"):
        return first
    for folder in reversed(file.relative_to(root).parts[:-1]):
        if found := next((word for word in _words(folder) if word in names), None):
            return found
    return ""


def _words(name: str) -> list[str]:
    return re.split("[^a-z]+", name.lower())

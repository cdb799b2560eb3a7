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
    apart = [n for n in TEST_NAMES if "val" not in (train or "").lower() or not n.startswith("val")]
    tests = (shortest_name(names, (wanted,)) for wanted in apart)
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
    if (first := re.match("[a-z]*", file.stem.lower())) and first[0] in (*names, "trainval"):
        return first[0]
    for folder in reversed(file.relative_to(root).parts[:-1]):
        words = re.split("[^a-z]+", folder.lower())
        if found := next((word for word in words if word in names), None):
            return found
    return ""

"""Which split of a data set is trained on, and which is tested on, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "valid", "test", "testing")


def train_and_test(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The names of the two splits; None for one that is not there. Validation comes before test,
    whose labels are often withheld."""
    names = list(names)
    train = next((name for name in names if name.lower().startswith(TRAIN_NAMES)), None)
    tests = (n for wanted in TEST_NAMES for n in names if n.lower().startswith(wanted))
    return train, next(tests, None)


def training_files(files: Sequence[Path]) -> list[Path]:
    """The files of the training split; none if no name says which they are."""
    return [file for file in files if file.stem.lower().startswith(TRAIN_NAMES)]


def test_files(files: Sequence[Path]) -> list[Path]:
    """The files of the first test split that there is."""
    for name in TEST_NAMES:
        if found := [file for file in files if file.stem.lower().startswith(name)]:
            return found
    return []

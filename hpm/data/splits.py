"""Choose the training and test splits of an annotated folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from hpm.core.errors import UserError
from hpm.data.split_names import TEST_NAMES, TRAIN_NAMES

Part = TypeVar("Part")


def pick_splits(
    annotated: Mapping[str, Part], bare: Iterable[str], root: Path, missing: str
) -> tuple[Part, Part | None]:
    """Choose the training and test splits by name (`train`, `val2017`, ...). Validation comes
    before test, which is often published without annotations.

    Args:
        annotated: the splits that have annotations.
        bare: names of splits that have images but no annotations.
        root: the folder, for messages.
        missing: what a bare split lacks, for messages ("masks").

    Raises UserError if there is no training split, or if only bare splits are left to test on.
    """
    train, test = _first(annotated, TRAIN_NAMES), _test(annotated)
    bare = list(bare)
    if train is None:
        if (name := _first(bare, TRAIN_NAMES)) is not None:
            raise UserError(f"{root}: the split {name} has images but no {missing}")
        raise UserError(f"{root}: no split to train on among {', '.join(sorted(annotated))}")
    if test is None and (name := _test(bare)) is not None:
        raise UserError(
            f"{root}: the split {name} has images but no {missing}: add them, or remove its images"
        )
    return annotated[train], None if test is None else annotated[test]


def is_split(name: str) -> bool:
    return _first([name], (*TRAIN_NAMES, *TEST_NAMES)) is not None


def _test(names: Iterable[str]) -> str | None:
    names = list(names)
    found = (_first(names, (wanted,)) for wanted in TEST_NAMES)
    return next((name for name in found if name is not None), None)


def _first(names: Iterable[str], beginnings: tuple[str, ...]) -> str | None:
    """The shortest name with such a beginning: `train` rather than `trainval`."""
    found = [name for name in names if name.lower().startswith(beginnings)]
    return min(found, key=lambda name: (len(name), name), default=None)

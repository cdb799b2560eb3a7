"""Choose the training and test splits of an annotated folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from hpm.core.errors import UserError
from hpm.data.split_names import TEST_NAMES, TRAIN_NAMES, train_and_test

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
    train, test = train_and_test(annotated)
    bare_train, bare_test = train_and_test(bare)
    if train is None:
        if bare_train is not None:
            raise UserError(f"{root}: the split {bare_train} has images but no {missing}")
        raise UserError(f"{root}: no split to train on among {', '.join(sorted(annotated))}")
    if test is None and bare_test is not None:
        raise UserError(
            f"{root}: the split {bare_test} has images but no {missing}: add them, or remove its "
            "images"
        )
    return annotated[train], None if test is None else annotated[test]


def is_split(name: str) -> bool:
    return name.lower().startswith((*TRAIN_NAMES, *TEST_NAMES))

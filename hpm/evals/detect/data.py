"""The training and test images of a detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpm.core.errors import UserError
from hpm.data.detection import has_masks, objects, open_detection
from hpm.data.sources import Source, Splits, Subset
from hpm.evals.detect import Options


@dataclass(frozen=True)
class DetectionData:
    """train, test: images with their objects. classes: names. masks, test_masks: whether the
    objects of each split have masks."""

    train: Source
    test: Source
    classes: list[str]
    masks: bool
    test_masks: bool


def open_data(options: Options) -> DetectionData:
    """Open the images that the options name. Raises UserError if annotations are wrong or
    missing."""
    splits = open_detection(options.data)
    if options.test:
        splits = Splits(splits.train, open_detection(options.test).test_or_all)
        _check_classes(splits.train, splits.test)
    rng = np.random.default_rng([options.seed, len(splits.train)])
    train, test = splits.train, splits.test
    if test is None:
        train, test = _hold_out(train, rng)
    if options.max_test_images and options.max_test_images < len(test):
        test = Subset(test, np.sort(rng.permutation(len(test))[: options.max_test_images]))
    for source in (train, test):
        if not any(len(objects(source, index)) for index in range(len(source))):
            raise UserError(f"{source.name}: none of {len(source)} images has an annotated object")
    masks = has_masks(train)
    return DetectionData(train, test, list(train.classes), masks, masks and has_masks(test))


def _check_classes(train: Source, test: Source | None) -> None:
    assert test is not None
    if list(train.classes) != list(test.classes):
        raise UserError(
            f"{test.name}: its categories ({_some(test.classes)}) are not those of {train.name} "
            f"({_some(train.classes)})"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])


def _hold_out(source: Source, rng: np.random.Generator) -> tuple[Source, Source]:
    """(the rest, a fifth of the images)."""
    if len(source) < 2:
        raise UserError(f"{source.name}: one image cannot be split: name test images by --test")
    order = rng.permutation(len(source))
    count = max(1, len(source) // 5)
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))

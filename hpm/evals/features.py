"""Features of a data set: computed once, each image exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.data.loader import evaluation_batches
from hpm.data.sources import Source, Splits, Subset
from hpm.errors import UserError


@dataclass
class Features:
    """Features and labels of the same images, in the same order."""

    features: Float[Tensor, "images dim"]
    labels: Int[Tensor, " images"]


def extract(
    embed: Callable[[Tensor], dict[str, Tensor]],
    source: Source,
    labels: np.ndarray,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    report: Callable[[str], None],
) -> dict[str, Features]:
    """Features of all readable images, of every kind that `embed` gives: uint8 [B C H W] -> [B D].

    Unreadable images are reported and left out, their labels with them.
    """
    found: dict[str, list[Tensor]] = {}
    indices = []
    for batch in evaluation_batches(source, size, channels, batch_size):
        for index, problem in batch.unreadable:
            report(f"cannot read {source.path(index)} ({problem}), passed over")
        if len(batch.images):
            indices.append(batch.indices)
            for name, features in embed(batch.images).items():
                found.setdefault(name, []).append(features.float().cpu())
    if not indices:
        raise UserError(f"{source.name}: no readable image")
    kept = torch.from_numpy(np.asarray(labels, dtype=np.int64))[torch.cat(indices)]
    return {name: Features(torch.cat(parts), kept) for name, parts in found.items()}


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline without a network: the pixels of the image, shrunk to about 32 by 32."""
    height, width = images.shape[-2:]
    scale = min(1.0, 32 / min(height, width))
    size = (round(height * scale), round(width * scale))
    small = F.interpolate(images.float(), size, mode="area")
    return small.flatten(1) - small.flatten(1).mean(1, keepdim=True)


@dataclass
class Labelled:
    """A source to train on and one to test on, their labels numbered alike."""

    train: Source
    train_labels: np.ndarray
    test: Source
    test_labels: np.ndarray
    classes: list[str]


def labelled_splits(splits: Splits, seed: int) -> Labelled:
    """Check and align the labels of two splits; without a second one, hold a fifth out by class."""
    train, test = splits.train, splits.test
    if train.labels is None:
        raise UserError(
            f"{train.name}: the images have no labels; give a folder with one folder per class, "
            "a list file with labels, or parquet with a label column"
        )
    if test is None:
        train, test = _hold_out_by_class(train, train.labels, seed)
    if test.labels is None:
        raise UserError(f"{test.name}: the images have no labels")
    assert train.labels is not None
    unknown = sorted(
        {test.classes[i] for i in np.unique(test.labels)}
        - {train.classes[i] for i in np.unique(train.labels)}
    )
    if unknown:
        raise UserError(
            f"{test.name} has {len(unknown)} classes that {train.name} has not, "
            f"the first '{unknown[0]}': nothing can be learned of them"
        )
    lacking = sorted(set(train.classes) - set(test.classes))
    if lacking:
        raise UserError(
            f"{train.name} has {len(lacking)} classes that {test.name} has not, "
            f"the first '{lacking[0]}': give both splits the same classes"
        )
    numbers = {name: i for i, name in enumerate(train.classes)}
    renumber = np.array([numbers[name] for name in test.classes])
    return Labelled(train, train.labels, test, renumber[test.labels], train.classes)


def _hold_out_by_class(source: Source, labels: np.ndarray, seed: int) -> tuple[Source, Source]:
    rng = np.random.default_rng([seed, len(source)])
    held = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise UserError(f"{source.name}: class '{source.classes[label]}' has one image only")
        held.append(members[: max(1, len(members) // 5)])
    test = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(source)), test)
    return Subset(source, rest), Subset(source, test)

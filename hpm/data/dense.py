"""Batches of images with annotations. A sample depends only on (seed, epoch, sample index)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from hpm.core.errors import UserError, one_line
from hpm.data.arrays import UnreadableImage
from hpm.data.detection import Objects
from hpm.data.loader import Key
from hpm.data.sources import Source
from hpm.data.unreadable import stand_ins
from hpm.data.workers import batch_loader

# (source, (epoch, index)) -> image [C H W], and labels [H W] or objects; see hpm.data.joint.
MakeSample = Callable[[Source, Key], tuple[Tensor, Any]]


@dataclass
class DenseBatch:
    """A batch of images and targets.

    images: [B C H W], or a list of [C H W] if sizes may differ; uint8, or float32 if the source has
    more than 8 bits, on a scale of 0 to 255. targets: for segmentation, uint8 labels [B H W] or a
    list of [H W]; for detection, a list of Objects; without annotations, a list of (height, width).
    indices: int64 [B], index of each sample. unreadable: (index, reason) of each sample that was
    replaced or skipped. error: a mistake in the annotations, which the loader raises.
    """

    images: Tensor | list[Tensor]
    targets: Tensor | list[Tensor] | list[Objects] | list[tuple[int, int]]
    indices: Tensor
    unreadable: list[tuple[int, str]]
    error: str | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def parts(self, count: int) -> list[DenseBatch]:
        """Split into equal parts, in order. The first one keeps `unreadable`."""
        size = -(-len(self) // count)
        starts = range(0, len(self), size)
        return [
            DenseBatch(
                self.images[start : start + size],
                self.targets[start : start + size],
                self.indices[start : start + size],
                [] if start else self.unreadable,
            )
            for start in starts
        ]

    def pin_memory(self) -> DenseBatch:
        images: Any
        targets: Any
        images, targets = (
            x.pin_memory() if isinstance(x, Tensor) else [_pinned(one) for one in x]
            for x in (self.images, self.targets)
        )
        return replace(self, images=images, targets=targets)


def _pinned(value: Any) -> Any:
    return value if isinstance(value, tuple) else value.pin_memory()


@dataclass(frozen=True)
class DenseSample:
    """An image and its annotations (None if unreadable), and what went wrong."""

    pair: tuple[Tensor, Any] | None
    index: int
    unreadable: list[tuple[int, str]]
    error: str | None = None


class DenseSamples(Dataset):
    """Samples by (epoch, index). With `stand_in`, another image replaces an unreadable one (see
    `stand_ins`), so that batches keep their size; otherwise the sample is empty."""

    def __init__(self, source: Source, make_sample: MakeSample, stand_in: bool):
        self.source, self.make_sample, self.stand_in = source, make_sample, stand_in

    def __getitem__(self, key: Key) -> DenseSample:
        epoch, index = key
        unreadable: list[tuple[int, str]] = []
        for candidate in stand_ins(index, len(self.source)) if self.stand_in else [index]:
            try:
                pair = self.make_sample(self.source, (epoch, candidate))
                return DenseSample(pair, candidate, unreadable)
            except (UnreadableImage, OSError) as error:
                unreadable.append((candidate, one_line(error)))
            except UserError as error:
                # Raised in the main process: a worker would wrap it in a traceback.
                return DenseSample(None, candidate, unreadable, str(error))
        return DenseSample(None, index, unreadable)


def dense_loader(
    source: Source,
    make_sample: MakeSample,
    steps: Iterable[Sequence[Key]],
    workers: int = 0,
    pin_memory: bool = False,
    stand_in: bool = True,
    stack: bool = True,
) -> Iterator[DenseBatch]:
    """One DenseBatch per list of keys (see `StepSampler`). Raises UserError for wrong annotations.

    stack: stack images, which must have one size, into one tensor, and labels likewise.
    """
    batches = batch_loader(
        DenseSamples(source, make_sample, stand_in),
        steps,
        _stacked if stack else _listed,
        workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
    )
    for batch in batches:
        if batch.error:
            raise UserError(batch.error)
        yield batch


def dense_batches(
    source: Source,
    make_sample: MakeSample,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[DenseBatch]:
    """All readable images of this process's share, in order, unstacked."""
    mine = range(rank, len(source), world_size)
    steps = [[(0, i) for i in mine[s : s + batch_size]] for s in range(0, len(mine), batch_size)]
    yield from dense_loader(source, make_sample, steps, workers, stand_in=False, stack=False)


def _stacked(samples: list[DenseSample]) -> DenseBatch:
    batch = _listed(samples)
    if not len(batch):
        return batch
    # In a worker, default_collate stacks in shared memory.
    images: Any = batch.images
    targets: Any = batch.targets
    if isinstance(targets[0], Tensor):
        targets = default_collate(targets)
    return replace(batch, images=default_collate(images), targets=targets)


def _listed(samples: list[DenseSample]) -> DenseBatch:
    pairs = [s.pair for s in samples if s.pair is not None]
    return DenseBatch(
        [image for image, _ in pairs],
        [target for _, target in pairs],
        torch.tensor([s.index for s in samples if s.pair is not None], dtype=torch.int64),
        [problem for s in samples for problem in s.unreadable],
        next((s.error for s in samples if s.error), None),
    )

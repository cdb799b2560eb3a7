"""Batches of views. What a sample looks like depends on (seed, epoch, sample index) alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hpm import distributed
from hpm.config import Flip
from hpm.data.arrays import UnreadableImage, at_depth
from hpm.data.sources import Source
from hpm.data.transforms import Crop, View, decode, evaluation_view, least_size, training_view
from hpm.errors import UserError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

Key = tuple[int, int]  # (epoch, index of the sample)
MakeView = Callable[[Source, Key], tuple[View, Crop | None]]


@dataclass
class Batch:
    """images: [B C H W], uint8, or float32 where the source holds more than 8 bits, 255 being full
    scale; indices: int64 [B], which samples they are; unreadable: (index, what is wrong) of each
    sample that another one had to stand in for; crops: float32 [B 4], where in its image each view
    lies (see transforms.Crop), None where that was not asked."""

    images: Tensor
    indices: Tensor
    unreadable: list[tuple[int, str]]
    crops: Tensor | None = None

    def parts(self, count: int) -> list[Batch]:
        """Equal parts, in order; what was unreadable goes with the first."""
        crops = [None] * count if self.crops is None else self.crops.chunk(count)
        views = zip(self.images.chunk(count), self.indices.chunk(count), crops, strict=True)
        parts = [Batch(images, indices, [], crop) for images, indices, crop in views]
        parts[0].unreadable = self.unreadable
        return parts

    def pin_memory(self) -> Batch:
        crops = None if self.crops is None else self.crops.pin_memory()
        return Batch(self.images.pin_memory(), self.indices.pin_memory(), self.unreadable, crops)


@dataclass(frozen=True)
class TrainingViews:
    """Random views, the same for the same (seed, epoch, index)."""

    size: tuple[int, int]
    channels: int
    seed: int
    crop_scale: tuple[float, float]
    flip: bool | Flip
    min_side: int

    def __call__(self, source: Source, key: Key) -> tuple[View, Crop]:
        rng = np.random.default_rng([self.seed, *key])
        least = least_size(self.size, self.crop_scale[0])
        pixels = decode(source.open(key[1]), self.channels, least, self.min_side)
        return training_view(pixels, self.size, rng, self.crop_scale, self.flip)


@dataclass(frozen=True)
class EvaluationViews:
    """The centre of each image."""

    size: tuple[int, int]
    channels: int
    min_side: int = 1

    def __call__(self, source: Source, key: Key) -> tuple[View, None]:
        view = evaluation_view(source.open(key[1]), self.size, self.channels, self.min_side)
        return view, None


@dataclass(frozen=True)
class Sample:
    """One view, or None where there is none, of which sample, and what could not be read."""

    view: View | None
    index: int
    unreadable: list[tuple[int, str]]
    crop: Crop | None = None


class Views(Dataset):
    """Views by (epoch, index). An unreadable image is passed over: with `stand_in` the next one
    takes its place, so that batches keep their size; without, there is no view (None)."""

    def __init__(self, source: Source, make_view: MakeView, stand_in: bool):
        self.source = source
        self.make_view = make_view
        self.stand_in = stand_in
        self.deep = source.is_deep()

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        unreadable: list[tuple[int, str]] = []
        for offset in range(len(self.source) if self.stand_in else 1):
            candidate = (index + offset) % len(self.source)
            try:
                view, crop = self.make_view(self.source, (epoch, candidate))
                return Sample(at_depth(view, self.deep), candidate, unreadable, crop)
            except (UnreadableImage, OSError) as error:
                unreadable.append((candidate, " ".join(str(error).split())))
        return Sample(None, index, unreadable)


class StepSampler(Sampler[list[Key]]):
    """The samples of one process, a list per optimiser step, from `start_step` to `total_steps`.

    Each epoch is a permutation of all samples; what does not fill a last batch is left out.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        total_steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.total_steps = start_step, total_steps
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.steps_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng([self.seed, epoch])
                order, order_epoch = rng.permutation(self.num_samples), epoch
            batch = order[position * self.batch_size :][: self.batch_size]
            yield [(epoch, int(i)) for i in batch[self.part]]


def training_loader(
    source: Source, make_view: MakeView, steps: Iterable[list[Key]], workers: int, pin_memory: bool,
    stand_in: bool = True,
) -> DataLoader:  # fmt: skip
    """One batch of views per list of keys; see Views for images that cannot be read."""
    return DataLoader(
        Views(source, make_view, stand_in),
        batch_sampler=steps,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def evaluation_batches(
    source: Source, size: tuple[int, int], channels: int, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """All readable images once, in order."""
    views = Views(source, EvaluationViews(size, channels), stand_in=False)
    keys = [(0, i) for i in range(len(source))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    yield from DataLoader(
        views,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
    )


def _collate(samples: list[Sample]) -> Batch:
    views = [s.view for s in samples if s.view is not None]
    indices = [s.index for s in samples if s.view is not None]
    crops = [s.crop for s in samples if s.crop is not None]
    unreadable = [problem for s in samples for problem in s.unreadable]
    images = torch.from_numpy(np.stack(views)) if views else torch.empty(0, dtype=torch.uint8)
    return Batch(
        images, torch.tensor(indices, dtype=torch.int64), unreadable,
        torch.tensor(crops, dtype=torch.float32) if crops else None,
    )  # fmt: skip


def measure_statistics(
    source: Source, size: tuple[int, int], channels: int, seed: int, min_side: int = 1,
    count: int = 512,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Mean and standard deviation of each channel, full scale being 1, over `count` random images.

    Raises UserError where no image can be read.
    """
    views = Views(source, EvaluationViews(size, channels, min_side), stand_in=False)
    sums, squares, images, problem = np.zeros(channels), np.zeros(channels), 0, "it is empty"
    for index in np.random.default_rng([seed, 1]).permutation(len(source)):
        sample = views[0, int(index)]
        if sample.view is None:
            problem = sample.unreadable[0][1]
            continue
        pixels = sample.view.reshape(channels, -1).astype(np.float64) / 255
        sums += pixels.mean(1)
        squares += (pixels**2).mean(1)
        images += 1
        if images == count:
            break
    if images == 0:
        raise UserError(f"{source.name}: no readable image among {len(source)} ({problem})")
    mean, mean_square = sums / images, squares / images
    # A channel that never varies must not be divided by zero; one of small numbers may vary little.
    scale = np.where(mean_square > 0, np.minimum(mean_square, 1), 1)
    std = np.sqrt(np.maximum(mean_square - mean**2, 1e-6 * scale))
    return mean.tolist(), std.tolist()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels [B C H W] -> float32, standardised by mean and std [C].

    Full scale is 255 in uint8 and floating point, 65535 in uint16, and 1 in mean and std.
    """
    full_scale = 65535 if images.dtype == torch.uint16 else 255
    return (images.float() / full_scale - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def num_workers(asked: int | None) -> int:
    """Processes that load images: as many as asked for, else one per spare core of this process,
    at most 8, at least 1."""
    if asked is not None:
        return asked
    world_size = distributed.world_size()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (cores or 1) // world_size - 1))

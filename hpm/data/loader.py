"""Batches of views. A sample depends only on (seed, epoch, sample index)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from hpm.core.choices import Flip
from hpm.core.errors import one_line
from hpm.core.retries import retried
from hpm.data.arrays import Pixels, UnreadableImage, at_depth
from hpm.data.cache import Cache
from hpm.data.inspection import loses_alpha
from hpm.data.notes import say_once
from hpm.data.sources import Source
from hpm.data.streams.lanes import Cursor
from hpm.data.transforms import Crop, View, decode, evaluation_view, least_size, training_view
from hpm.data.unreadable import stand_ins
from hpm.data.video.clips import ClipEvaluationViews, ClipViews, Key, view_keys
from hpm.data.video.sampling import ONE_VIEW, ClipSampling, Times, ViewGrid
from hpm.data.video.sources import holds_videos
from hpm.data.workers import batch_loader

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# A view, its crop, and for clips its times. None where views do not know.
Made = tuple[View, Crop | None] | tuple[View, Crop | None, Times | None]
MakeView = Callable[[Source, Key], Made]


@dataclass
class Batch:
    """A batch of views.

    images: [B C H W], or clips [B C T H W]; uint8, or float32 if the source has more than 8 bits,
    on a scale of 0 to 255.
    indices: int64 [B], index of each sample. unreadable: (index, reason) of each sample that was
    replaced or skipped. crops: float32 [B 4], the position of each view in its image (see
    transforms.Crop), or None. own_ids: int64 [B], unique for each view of a sample, or None with
    one view per sample. times: float32 [B 2], start and end of each clip as fractions of its
    video's duration, or None for images. cursors: for a stream, progress of lanes after the batch.
    """

    images: Tensor
    indices: Tensor
    unreadable: list[tuple[int, str]]
    crops: Tensor | None = None
    own_ids: Tensor | None = None
    times: Tensor | None = None
    cursors: dict[int, Cursor] = field(default_factory=dict)

    @property
    def view_ids(self) -> Tensor:
        """int64 [B]: seeds of the masks."""
        return self.indices if self.own_ids is None else self.own_ids

    def parts(self, count: int) -> list[Batch]:
        """Split into equal parts, in order. The first one keeps `unreadable`."""
        split = [
            [None] * count if x is None else x.chunk(count)
            for x in (self.images, self.indices, self.crops, self.own_ids, self.times)
        ]
        parts = [
            Batch(images, indices, [], crops, ids, times)
            for images, indices, crops, ids, times in zip(*split, strict=True)
        ]
        parts[0].unreadable = self.unreadable
        return parts

    def complete(self, views: int) -> tuple[Tensor, Tensor]:
        """(images, indices) of the samples of which all views are there: `views` consecutive images
        per sample, and one index."""
        if views == 1:
            return self.images, self.indices
        _, inverse, counts = self.indices.unique(return_inverse=True, return_counts=True)
        kept = counts[inverse] == views
        return self.images[kept], self.indices[kept][::views]

    def pin_memory(self) -> Batch:
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **pinned)


@dataclass
class TrainingViews:
    """Random views, a function of (seed, epoch, index) and the view index. Consecutive views of one
    image decode it once."""

    size: tuple[int, int]
    channels: int
    seed: int
    crop_scale: tuple[float, float]
    flip: bool | Flip
    min_side: int
    cache: Cache | None = None

    def __post_init__(self) -> None:
        self._last: tuple[Source, int, Pixels] | None = None

    def __call__(self, source: Source, key: Key) -> tuple[View, Crop]:
        rng = np.random.default_rng([self.seed, *key])
        pixels = self._pixels(source, key[1])
        return training_view(pixels, self.size, rng, self.crop_scale, self.flip)

    def decoded(self, source: Source, index: int) -> Pixels:
        """Decode an image at the size that its views need. Raises OSError or UnreadableImage."""
        least = least_size(self.size, self.crop_scale[0])
        return decode(source.open(index), self.channels, least, self.min_side)

    def _pixels(self, source: Source, index: int) -> Pixels:
        """The pixels of an image: from the last call, from the cache, or decoded."""
        if self._last and self._last[0] is source and self._last[1] == index:
            return self._last[2]
        pixels = self.cache.get(index, self.channels) if self.cache else None
        if pixels is None:
            pixels = self.decoded(source, index)
            if self.cache:
                self.cache.put(index, pixels)
        self._last = source, index, pixels
        return pixels


@dataclass(frozen=True)
class EvaluationViews:
    """The centre of each image."""

    size: tuple[int, int]
    channels: int
    min_side: int = 1
    crop_share: float = 1.0

    def __call__(self, source: Source, key: Key) -> tuple[View, None]:
        image = source.open(key[1])
        view = evaluation_view(image, self.size, self.channels, self.min_side, self.crop_share)
        return view, None


@dataclass(frozen=True)
class Sample:
    """A view (None if unreadable), the index of its sample, and what could not be read."""

    view: View | None
    index: int
    unreadable: list[tuple[int, str]]
    crop: Crop | None = None
    own_id: int = 0
    times: Times | None = None


class Views(Dataset):
    """Views by (epoch, index). With `stand_in`, another image replaces an unreadable one (see
    `stand_ins`), so that batches keep their size; otherwise the sample is empty."""

    def __init__(self, source: Source, make_view: MakeView, stand_in: bool):
        self.source = source
        self.make_view = make_view
        self.stand_in = stand_in
        self.deep = source.is_deep()
        channels = getattr(make_view, "channels", 0)
        if not holds_videos(source) and loses_alpha(source.open, len(source), channels):
            say_once(
                f"{source.name}: transparency (a fourth channel) is dropped because "
                f"channels is {channels}; --channels 4 keeps it"
            )

    def __getitem__(self, key: Key) -> Sample:
        epoch, index, *number = key
        unreadable: list[tuple[int, str]] = []
        for candidate in stand_ins(index, len(self.source)) if self.stand_in else [index]:
            try:
                made = partial(self.make_view, self.source, (epoch, candidate, *number))
                view, crop, *rest = retried(made)
                view = at_depth(view, self.deep)
                # The first view's id is its sample's index, as if it were the only view.
                own_id = candidate + sum(number) * len(self.source)
                times = rest[0] if rest else None
                return Sample(view, candidate, unreadable, crop, own_id, times)
            except (UnreadableImage, OSError) as error:
                unreadable.append((candidate, one_line(error)))
        return Sample(None, index, unreadable)


class StepSampler(Sampler[list[Key]]):
    """The samples of one process, a list per optimiser step, from `start_step` to `total_steps`.

    Each epoch is a permutation of all samples; an incomplete last batch is dropped. With `repeats`,
    each sample appears that many times in its batch, and a permutation lasts `repeats` epochs.
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
        repeats: int = 1,
    ):
        self.num_samples, self.seed, self.repeats = num_samples, seed, repeats
        self.start_step, self.total_steps = start_step, total_steps
        self.samples = batch_size // repeats  # distinct samples per step, over all processes
        self.part = slice(
            rank * self.samples // world_size, (rank + 1) * self.samples // world_size
        )
        self.steps_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        order, last_round = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch = step // self.steps_per_epoch
            this_round, position = divmod(step, self.steps_per_epoch * self.repeats)
            if this_round != last_round:
                rng = np.random.default_rng([self.seed, this_round])
                order, last_round = rng.permutation(self.num_samples), this_round
            batch = order[position * self.samples :][: self.samples][self.part]
            yield view_keys(epoch, batch.tolist(), self.repeats)


def training_views(
    source: Source,
    size: tuple[int, int],
    channels: int,
    seed: int,
    crop_scale: tuple[float, float],
    flip: bool | Flip,
    min_side: int,
    sampling: ClipSampling | None = None,
) -> TrainingViews | ClipViews:
    """Random views of images, or of videos: clips with `sampling`, else random frames."""
    if holds_videos(source):
        clip = sampling or ClipSampling(1, 1)
        return ClipViews(size, channels, seed, crop_scale, flip, min_side, clip)
    return TrainingViews(size, channels, seed, crop_scale, flip, min_side)


def evaluation_views(
    size: tuple[int, int],
    channels: int,
    crop_share: float = 1.0,
    sampling: ClipSampling | None = None,
    grid: ViewGrid = ONE_VIEW,
) -> EvaluationViews | ClipEvaluationViews:
    """The centre of each image; with `sampling`, the clip in the middle of each video, or the views
    of a grid."""
    if sampling is None:
        return EvaluationViews(size, channels, crop_share=crop_share)
    return ClipEvaluationViews(size, channels, sampling, crop_share=crop_share, grid=grid)


def training_loader(
    source: Source,
    make_view: MakeView,
    steps: Iterable[Sequence[Key]],
    workers: int,
    pin_memory: bool,
    stand_in: bool = True,
) -> DataLoader:
    """One batch of views per list of keys. See Views for unreadable images."""
    return batch_loader(
        Views(source, make_view, stand_in),
        steps,
        collate,
        workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def evaluation_batches(
    source: Source,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    workers: int = 0,
    crop_share: float = 1.0,
    sampling: ClipSampling | None = None,
    pin_memory: bool = False,
    grid: ViewGrid = ONE_VIEW,
) -> Iterator[Batch]:
    """All readable images once, in order; with `sampling`, a clip of each video, or all views of
    the grid, of which no batch holds a part only."""
    make_view = evaluation_views(size, channels, crop_share, sampling, grid)
    views = Views(source, make_view, stand_in=False)
    samples = max(1, batch_size // grid.count)
    starts = range(0, len(source), samples)
    ids = (range(start, min(start + samples, len(source))) for start in starts)
    steps = (view_keys(0, each, grid.count) for each in ids)
    yield from batch_loader(views, steps, collate, workers, pin_memory=pin_memory)


def collate(samples: list[Sample]) -> Batch:
    """One batch of samples; those without a view are left out."""
    views = [s.view for s in samples if s.view is not None]
    indices = [s.index for s in samples if s.view is not None]
    crops = [s.crop for s in samples if s.crop is not None]
    times = [s.times for s in samples if s.times is not None]
    unreadable = [problem for s in samples for problem in s.unreadable]
    # In a worker, default_collate stacks in shared memory.
    tensors = [torch.from_numpy(view) for view in views]
    images = default_collate(tensors) if tensors else torch.empty(0, dtype=torch.uint8)
    return Batch(
        images,
        torch.tensor(indices, dtype=torch.int64),
        unreadable,
        torch.tensor(crops, dtype=torch.float32) if crops else None,
        torch.tensor([s.own_id for s in samples if s.view is not None], dtype=torch.int64),
        torch.tensor(times, dtype=torch.float32) if times else None,
    )


def normalize(images: Tensor, mean: Tensor, std: Tensor, full_scale: float | None = None) -> Tensor:
    """Convert pixels [B C H W], or clips [B C T H W], to float32 and normalise them by mean and
    std [C], given on a scale of 0 to 1.

    full_scale: of the pixels. Default: 65535 for uint16, else 255.
    """
    if full_scale is None:
        full_scale = 65535 if images.dtype == torch.uint16 else 255
    by_channel = (-1,) + (1,) * max(2, images.ndim - 2)
    return (images.float() / full_scale - mean.view(by_channel)) / std.view(by_channel)

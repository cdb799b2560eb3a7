"""Views of clips. Like those of images, a function of (seed, epoch, index) and the view index."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpm.core.choices import Flip
from hpm.data.arrays import Box, View, reading
from hpm.data.transforms import (
    Crop,
    centre_view,
    centred_box,
    check_side,
    cropped_view,
    least_size,
    random_crop,
    resized_size,
)
from hpm.data.video.clip import Clip, read_clip
from hpm.data.video.sampling import ONE_VIEW, ClipSampling, Times, ViewGrid

Key = tuple[int, ...]  # (epoch, sample index), and the view index with several views per sample
WHOLE = (1.0, 1.0)  # crop_scale that leaves nothing to chance


def view_keys(epoch: int, ids: Iterable[int], views: int) -> list[Key]:
    """The keys of samples, or of all their views if these are several."""
    if views == 1:
        return [(epoch, int(i)) for i in ids]
    return [(epoch, int(i), view) for i in ids for view in range(views)]


@dataclass
class ClipViews:
    """Random clips: a start drawn at random, one random crop and flip for all frames.

    The views of one sample in an epoch share its decoded clip, each with its own crop and flip, as
    in VideoMAE's repeated augmentation. A crop_scale of (1, 1) takes the centre. With one frame,
    views are images [C H W], without times.
    """

    size: tuple[int, int]
    channels: int
    seed: int
    crop_scale: tuple[float, float]
    flip: bool | Flip
    min_side: int
    sampling: ClipSampling

    def __post_init__(self) -> None:
        self._last: tuple[Any, int, int, tuple[Clip, Times]] | None = None

    def __call__(self, source: Any, key: Key) -> tuple[View, Crop, Times | None]:
        rng = np.random.default_rng([self.seed, *key])
        clip, times = self.clip(source, key[0], key[1])
        check_side(clip, self.min_side)
        if self.crop_scale == WHOLE:
            box = centred_box(clip.width, clip.height, self.size)
        else:
            box = random_crop(rng, clip.width, clip.height, self.crop_scale)
        view, crop = cropped_view(clip, self.size, box, rng, self.flip)
        return image_or_clip(view), crop, times if self.sampling.frames > 1 else None

    def clip(self, source: Any, epoch: int, index: int) -> tuple[Clip, Times]:
        """The decoded clip that the views of a sample share. Raises OSError or UnreadableImage."""
        if self._last and self._last[:3] == (source, epoch, index):
            return self._last[3]
        # Five numbers: no crop is drawn from the same.
        share = np.random.default_rng([self.seed, epoch, index, 0, 1]).random()
        least = least_size(self.size, self.crop_scale[0])
        with reading(), closing(source.open_video(index)) as video:
            found = read_clip(
                video,
                self.sampling,
                lambda length: self.sampling.drawn_start(length, share),
                self.channels,
                least,
            )
        self._last = source, epoch, index, found
        return found


@dataclass
class ClipEvaluationViews:
    """The centre of the clip in the middle of each video, or the views of a grid of several.

    The view index counts the crops of the first segment, then those of the second. Consecutive
    crops decode their segment once. Several crops have the shape of `size` and are as large as
    possible; crop_share is for a single one.
    """

    size: tuple[int, int]
    channels: int
    sampling: ClipSampling
    min_side: int = 1
    crop_share: float = 1.0
    grid: ViewGrid = ONE_VIEW

    def __post_init__(self) -> None:
        self._last: tuple[Any, int, int, tuple[Clip, Times]] | None = None

    def __call__(self, source: Any, key: Key) -> tuple[View, None, Times | None]:
        segment, crop = divmod(key[2] if len(key) > 2 else 0, self.grid.crops)
        clip, times = self._clip(source, key[1], segment)
        check_side(clip, self.min_side)
        view = image_or_clip(self._cropped(clip, crop))
        return view, None, times if self.sampling.frames > 1 else None

    def _cropped(self, clip: Clip, crop: int) -> View:
        if self.grid.crops == 1:
            return centre_view(clip, self.size, self.crop_share)
        with reading():
            box = crop_box(clip.width, clip.height, self.size, crop, self.grid.crops)
            return clip.resized(self.size, box)

    def _clip(self, source: Any, index: int, segment: int) -> tuple[Clip, Times]:
        if self._last and self._last[:3] == (source, index, segment):
            return self._last[3]
        least = resized_size(self.size, self.size, self.crop_share)
        with reading(), closing(source.open_video(index)) as video:
            found = read_clip(
                video,
                self.sampling,
                lambda length: self.sampling.segment_start(length, segment, self.grid.segments),
                self.channels,
                least,
            )
        self._last = source, index, segment, found
        return found


def crop_box(width: int, height: int, size: tuple[int, int], crop: int, crops: int) -> Box:
    """One of `crops` boxes of the shape of `size`, as large as possible, evenly spaced along the
    axis on which they do not fill the image; a single one is centred."""
    left, top, right, bottom = centred_box(width, height, size)
    if crops == 1:
        return left, top, right, bottom
    across, down = right - left, bottom - top
    left = round(crop / (crops - 1) * (width - across))
    top = round(crop / (crops - 1) * (height - down))
    return left, top, left + across, top + down


def image_or_clip(view: View) -> View:
    """[C T H W], or [C H W] of a single frame."""
    return view[:, 0] if view.shape[1] == 1 else view

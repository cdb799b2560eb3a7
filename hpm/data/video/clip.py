"""The decoded frames of a clip, and what a video is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hpm.data.arrays import Box, View, in_units_of_255, recoloured, resize
from hpm.data.video.sampling import ClipSampling, Times


class EndsEarly(Exception):
    """A video has fewer frames than its header says; its `length` is now right."""


@runtime_checkable
class Video(Protocol):
    """An opened video."""

    @property
    def length(self) -> int:
        """Number of frames at the mean rate. An estimate of the header until EndsEarly is
        raised."""
        ...

    def read(
        self, numbers: Sequence[int], channels: int = 3, least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Decode frames of rising numbers: [frames H W channels in the file], uint8, uint16 or
        float32, the last in units of 255.

        channels: of a view, for the check that frames can be converted to them. least: (height,
        width) that suffice; larger frames may be reduced to it. Numbers past the end give the last
        frame. Raises EndsEarly, OSError or UnreadableImage.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Clip:
    """Decoded frames [frames H W channels in the file], uint8, uint16 or float32, the last in units
    of 255; of `channels` in a view."""

    frames: np.ndarray
    channels: int

    @property
    def width(self) -> int:
        return self.frames.shape[2]

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    def resized(self, size: tuple[int, int], box: Box) -> View:
        """Crop all frames to `box` and resize them to `size`: [C T H W]."""
        left, top, right, bottom = box
        part = self.frames[:, top:bottom, left:right].transpose(0, 3, 1, 2)
        if part.dtype == np.uint16:
            part = in_units_of_255(part)
        if part.shape[2:] == size:
            view = part.swapaxes(0, 1)
        elif part.dtype != np.uint8 or size == (1, 1):
            view = np.stack([resize(frame, size) for frame in part], 1)
        else:
            resized = F.interpolate(torch.from_numpy(part), size, mode="bicubic", antialias=True)
            view = resized.transpose(0, 1).numpy()
        if self.frames.dtype == np.uint16:
            view = view.clip(0, 255)  # the filter overshoots at edges
        view = view if len(view) == self.channels else recoloured(view, self.channels)
        return np.ascontiguousarray(view)


def read_clip(
    video: Video,
    sampling: ClipSampling,
    start_of: Callable[[int], int],
    channels: int,
    least: tuple[int, int] | None = None,
) -> tuple[Clip, Times]:
    """The clip that starts at `start_of(length)`. Raises OSError or UnreadableImage.

    Where a video turns out to be shorter than its header says, the start is chosen again.
    """
    while True:
        start = start_of(video.length)
        try:
            frames = video.read(sampling.numbers(start), channels, least)
        except EndsEarly:
            continue
        return Clip(frames, channels), sampling.times(start, video.length)


def middle_frame(video: Video) -> Image.Image:
    """The frame in the middle of a video of 8-bit frames, which is closed then."""
    one = ClipSampling(1, 1)
    with closing(video):
        clip, _ = read_clip(video, one, lambda length: one.segment_start(length, 0, 1), channels=3)
    return Image.fromarray(np.ascontiguousarray(clip.frames[0]))

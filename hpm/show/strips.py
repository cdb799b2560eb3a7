"""Clips as film strips: some of their frames side by side, or all, for an animation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from hpm.show.figures import Picture, Pixels

FRAMES = 4  # of a strip


def as_strips(shown: Picture, frames: int = FRAMES) -> Picture:
    """Lay at most this many frames of each clip side by side, evenly spaced, so that a picture of
    clips is one of images. The maps are those of the tubes that the frames belong to. A picture of
    images is returned as it is."""
    if shown.images.ndim == 4:
        return shown
    return _lay(shown, _spaced(shown.images.shape[2], shown.grid[0], frames))


def frames_text(frames: int, times: int) -> str:
    """Which frames of a clip a strip shows: `frames 1, 5, 11 and 15 of 16`. times: tubes in a row
    over the time of the clip."""
    *numbers, last = [str(number) for number in (_spaced(frames, times, FRAMES) + 1).tolist()]
    if not numbers:
        return f"frame {last} of {frames}"
    return f"frames {', '.join(numbers)} and {last} of {frames}"


def _spaced(frames: int, times: int, count: int) -> Tensor:
    """Numbers of at most `count` frames, evenly spaced, each the first of its tube."""
    chosen = torch.linspace(0, times - 1, min(count, times)).round().long()
    return chosen * (frames // times)


def all_frames(shown: Picture) -> Picture:
    """Lay all frames of each clip side by side: a map then has the same colours at all times, also
    where `cut` makes frames of it again. A picture of images is returned as it is."""
    return shown if shown.images.ndim == 4 else _lay(shown, torch.arange(shown.images.shape[2]))


def cut(panel: Pixels, frames: int | None) -> UInt8[np.ndarray, "*frames height columns 3"]:
    """The frames [T H W 3] of a panel of `all_frames`; the panel itself of an image (None)."""
    return panel if frames is None else np.stack(np.split(panel, frames, axis=1))


def count_frames(shown: Picture) -> int | None:
    """Frames of each clip; None for images."""
    return None if shown.images.ndim == 4 else shown.images.shape[2]


def _lay(shown: Picture, numbers: Tensor) -> Picture:
    """Lay these frames side by side, and the maps of their tubes."""
    times, rows, columns = shown.grid
    chosen = numbers // (shown.images.shape[2] // times)

    def of_pixels(clips: Tensor) -> Tensor:
        return clips[:, :, numbers].movedim(2, 3).flatten(3)

    def of_patches(values: Tensor, axis: int) -> Tensor:
        cut = values.unflatten(axis, shown.grid).index_select(axis, chosen)
        return cut.movedim(axis, axis + 1).flatten(axis, axis + 2)

    strip = replace(shown, images=of_pixels(shown.images), grid=(rows, len(chosen) * columns))
    strip.laid = True
    if shown.reconstruction is not None:
        strip.reconstruction = of_pixels(shown.reconstruction)
    for name, axis in (("actual", 1), ("predicted", 1), ("mask", 1), ("pca", 1), ("attention", 2)):
        values = getattr(shown, name)
        if values is not None:
            setattr(strip, name, of_patches(values, axis))
    return strip

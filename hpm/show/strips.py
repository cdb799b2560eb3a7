"""Clips as film strips: some of their frames side by side."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hpm.show.figures import Picture

FRAMES = 4  # of a strip


def as_strips(shown: Picture, frames: int = FRAMES) -> Picture:
    """Lay at most this many frames of each clip side by side, evenly spaced, so that a picture of
    clips is one of images. The maps are those of the tubes that the frames belong to. A picture of
    images is returned as it is."""
    if shown.images.ndim == 4:
        return shown
    times, rows, columns = shown.grid
    chosen = torch.linspace(0, times - 1, min(frames, times)).round().long()
    per_tube = shown.images.shape[2] // times

    def of_pixels(clips: Tensor) -> Tensor:
        return clips[:, :, chosen * per_tube].movedim(2, 3).flatten(3)

    def of_patches(values: Tensor, axis: int) -> Tensor:
        cut = values.unflatten(axis, shown.grid).index_select(axis, chosen)
        return cut.movedim(axis, axis + 1).flatten(axis, axis + 2)

    strip = replace(shown, images=of_pixels(shown.images), grid=(rows, len(chosen) * columns))
    if shown.reconstruction is not None:
        strip.reconstruction = of_pixels(shown.reconstruction)
    for name, axis in (("actual", 1), ("predicted", 1), ("mask", 1), ("pca", 1), ("attention", 2)):
        values = getattr(shown, name)
        if values is not None:
            setattr(strip, name, of_patches(values, axis))
    return strip

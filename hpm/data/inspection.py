"""Inspect a sample of a source's images, instead of all of them, for bit depth and transparency."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image

from hpm.data.arrays import ArrayImage, Opened, UnreadableImage, is_deep

SAMPLED = 64  # images opened to decide whether a source is deep or has alpha


def spaced(count: int, most: int) -> list[int]:
    """Evenly spaced indices, all of them if there are few."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def any_deep(open_one: Callable[[int], Opened], count: int) -> bool:
    """Whether any of some evenly spaced images has more than 8 bits per channel.

    Opening all would take minutes for a large source, whose images are mostly alike. A deep image
    that is missed is reduced to 8 bits.
    """
    for index in spaced(count, SAMPLED):
        with suppress(UnreadableImage, OSError):
            if is_deep(open_one(index)):
                return True
    return False


def loses_alpha(open_one: Callable[[int], Opened], count: int, channels: int) -> bool:
    """Whether any of some evenly spaced images has an alpha channel that `channels` would drop."""
    if channels not in (1, 3):
        return False
    for index in spaced(count, SAMPLED):
        with suppress(UnreadableImage, OSError):
            if _has_alpha(open_one(index)):
                return True
    return False


def _has_alpha(image: Opened) -> bool:
    if isinstance(image, Image.Image):
        return image.mode in ("RGBA", "RGBa", "RGBX", "LA", "PA") or "transparency" in image.info
    return isinstance(image, ArrayImage) and image.colours and image.shape[-1] in (2, 4)

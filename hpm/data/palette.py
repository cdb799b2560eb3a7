"""Colours of classes."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def class_colours(count: int) -> UInt8[np.ndarray, "{count} 3"]:
    """The colour map of Pascal VOC, which other software knows as well: the bits of a class's
    number, spread over the high bits of red, green and blue."""
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours

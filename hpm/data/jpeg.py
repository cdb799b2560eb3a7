"""Decoding JPEG files: libjpeg-turbo without Pillow around it, to the same pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes, to the same pixels
    simplejpeg = None

COLOURS = {1: "GRAY", 3: "RGB"}


def decode_jpeg(
    image: Image.Image, channels: int, least: tuple[int, int] | None
) -> np.ndarray | None:
    """The pixels [channels H W] of an image that Pillow opened from memory and has not decoded.

    Upright, and at a half, a quarter or an eighth where that leaves `least` (height, width), as
    Pillow's `draft` chooses. None where that is left to Pillow: what is no JPEG, CMYK, and damaged
    files, of which Pillow reads some, and says of the others what is wrong.
    """
    file = getattr(image, "fp", None)
    if simplejpeg is None or image.format not in ("JPEG", "MPO") or channels not in COLOURS:
        return None
    if image.mode not in ("L", "RGB") or not isinstance(file, io.BytesIO):
        return None
    scale = reduction(image.size, least)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            file.getvalue(), COLOURS[channels], min_width=-(-image.width // scale),
            min_height=-(-image.height // scale), min_factor=scale,
        )  # fmt: skip
    except ValueError:
        return None
    return upright(pixels.transpose(2, 0, 1), image.getexif().get(ExifTags.Base.Orientation, 1))


def reduction(size: tuple[int, int], least: tuple[int, int] | None) -> int:
    """By how much an image of (width, height) may be reduced to leave `least` (height, width)."""
    if least is None:
        return 1
    possible = min(size[0] // least[1], size[1] // least[0])
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(1, possible))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[C H W], turned as EXIF says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return pixels

"""Decode JPEG files with libjpeg-turbo directly. The pixels equal Pillow's."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from hpm.data.pillow import open_by_pillow

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes instead
    simplejpeg = None

COLOURS = {1: "GRAY", 3: "RGB"}
START = b"\xff\xd8\xff"
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
EXIF_OR_XMP, SCAN = 0xE1, 0xDA  # JPEG markers


@dataclass(frozen=True)
class JpegImage:
    """The bytes of a JPEG file, not parsed yet."""

    data: bytes

    def opened(self) -> Image.Image:
        """Open it with Pillow, without decoding."""
        return open_by_pillow(io.BytesIO(self.data))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored, before EXIF orientation."""
        return self.opened().size


def decode_jpeg(
    image: JpegImage, channels: int, least: tuple[int, int] | None
) -> np.ndarray | None:
    """Upright pixels [channels H W], reduced to 1/2, 1/4 or 1/8 if that still covers `least`
    (height, width), as Pillow's `draft` does.

    Returns None for files that Pillow must handle: CMYK, alpha, very large images and damaged
    files, some of which Pillow can read; for the others its error says what is wrong.
    """
    if simplejpeg is None or channels not in COLOURS:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image.data)
        if colours in ("CMYK", "YCCK") or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        orientation = _orientation(image)
        if orientation is None:
            return None
        scale = reduction((width, height), least and turned(least, orientation))
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            image.data,
            COLOURS[channels],
            min_width=-(-width // scale),
            min_height=-(-height // scale),
            min_factor=scale,
        )
    except ValueError:
        return None
    return upright(pixels.transpose(2, 0, 1), orientation)


def _orientation(image: JpegImage) -> int | None:
    """The EXIF orientation, 1 if there is none; None if the EXIF data is broken."""
    if not _may_have_orientation(image.data):
        return 1
    try:
        return exif_orientation(image.opened())
    except Exception:  # it fails in many ways
        return None


def _may_have_orientation(data: bytes) -> bool:
    """Is there a segment that may hold an orientation? Much faster than parsing with Pillow."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        if data[at + 1] in (EXIF_OR_XMP, 0xFF):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def reduction(size: tuple[int, int], least: tuple[int, int] | None) -> int:
    """The largest factor (1, 2, 4 or 8) by which an image of `size` (width, height) can be reduced
    and still cover `least` (height, width)."""
    if least is None:
        return 1
    possible = min(size[0] // least[1], size[1] // least[0])
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(1, possible))


def exif_orientation(image: Image.Image) -> int:
    """1 to 8, 1 being upright. Raises exceptions of many kinds on broken EXIF data."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The size as stored of an image of this upright size, or the other way round."""
    return size[::-1] if orientation in QUARTER_TURNS else size


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to pixels [C H W]."""
    if orientation in QUARTER_TURNS:
        pixels = pixels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return pixels

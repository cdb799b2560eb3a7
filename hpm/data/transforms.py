"""From an opened image to a view of a fixed size: uint8, or float32 where the image holds more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hpm.config import Flip
from hpm.data.arrays import (
    BICUBIC,
    ArrayImage,
    Pixels,
    UnreadableImage,
    View,
    at_depth,
    from_pillow,
    in_units_of_255,
    is_deep,
    reading,
    recoloured,
)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FLIPPED_AXES: dict[bool | Flip, tuple[int, ...]] = {
    True: (2,), "horizontal": (2,), "vertical": (1,), "both": (2, 1), "none": (), False: (),
}  # fmt: skip
Box = tuple[float, float, float, float]  # left, top, right, bottom; in pixels
# Where the first and last row, the first and last column of a view come from, as shares of the
# image: (top, bottom, left, right), a flipped axis from the larger to the smaller.
Crop = tuple[float, float, float, float]


def training_view(
    image: Image.Image | ArrayImage,
    size: tuple[int, int],
    channels: int,
    rng: np.random.Generator,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool | Flip = True,
    min_side: int = 1,
) -> tuple[View, Crop]:
    """Random resized crop (bicubic) and flips; all choices are drawn from `rng`."""
    with reading():
        _draft(image, size, channels, crop_scale[0])
        pixels = _decode(image, channels, min_side)
        box = random_crop(rng, pixels.width, pixels.height, crop_scale)
        view = pixels.resized(size, box)
        left, top, right, bottom = box
        edges = {1: (top / pixels.height, bottom / pixels.height),
                 2: (left / pixels.width, right / pixels.width)}  # fmt: skip
        for axis in FLIPPED_AXES[flip]:
            if rng.random() < 0.5:
                view = np.flip(view, axis)
                edges[axis] = edges[axis][::-1]
        return np.ascontiguousarray(view), (*edges[1], *edges[2])


def augmented_view(
    image: Image.Image | ArrayImage,
    channels: int,
    augment: Callable[[Image.Image], Any],
    min_side: int = 1,
) -> View:
    """A view made by a transform of another library, from an RGB image to one of the size."""
    with reading():
        # Those transforms know RGB in 8 bits; grey is turned back afterwards.
        pixels = _decode(image, max(channels, 3), min_side)
        view = augment(pixels.image if isinstance(pixels, Picture) else _to_rgb(pixels))
        return _to_array(view.convert(MODES[channels]))


def evaluation_view(
    image: Image.Image | ArrayImage, size: tuple[int, int], channels: int, min_side: int = 1
) -> View:
    """The largest centred box of the size's shape, resized (bicubic)."""
    with reading():
        _draft(image, size, channels, 1.0)
        pixels = _decode(image, channels, min_side)
        return pixels.resized(size, centred_box(pixels.width, pixels.height, size))


@dataclass(frozen=True)
class Picture:
    """Decoded pixels that Pillow has a mode for, in that mode."""

    image: Image.Image

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def resized(self, size: tuple[int, int], box: Box) -> View:
        """The part in `box` at `size` (height, width)."""
        return _to_array(self.image.resize(size[::-1], BICUBIC, box=box))


def centred_box(width: int, height: int, size: tuple[int, int]) -> Box:
    """The largest centred box of the shape of `size` (height, width)."""
    ratio = size[1] / size[0]
    w, h = (ratio * height, height) if width / height >= ratio else (width, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def random_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> Box:
    """Box of a random area and shape (3:4 to 4:3), within the image."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # No box of that shape fits, as in a very long image: the largest centred one does.
    dx = (width - min(width, height * 4 / 3)) / 2
    dy = (height - min(height, width * 4 / 3)) / 2
    return dx, dy, width - dx, height - dy


def _draft(
    image: Image.Image | ArrayImage, size: tuple[int, int], channels: int, smallest_crop: float
) -> None:
    """Let a JPEG be decoded at a half, a quarter or an eighth where even the smallest crop of it
    still has the pixels that the view needs."""
    if isinstance(image, Image.Image) and channels in MODES:
        side = 1 / math.sqrt(smallest_crop)
        image.draft(MODES[channels], (math.ceil(size[1] * side), math.ceil(size[0] * side)))


def _decode(image: Image.Image | ArrayImage, channels: int, min_side: int) -> Picture | Pixels:
    pixels: Picture | Pixels
    if isinstance(image, Image.Image) and not is_deep(image) and channels in MODES:
        _check_side(image.width, image.height, min_side)
        return Picture(ImageOps.exif_transpose(image).convert(MODES[channels]))
    if isinstance(image, Image.Image):
        ImageOps.exif_transpose(image, in_place=True)
        image = from_pillow(image)
    pixels = image.pixels(channels)
    _check_side(pixels.width, pixels.height, min_side)
    return pixels


def _check_side(width: int, height: int, min_side: int) -> None:
    if min(width, height) < min_side:
        raise UnreadableImage(f"{width}x{height} pixels, smaller than a patch of {min_side}")


def _to_rgb(pixels: Pixels) -> Image.Image:
    """Reduced to 8 bits."""
    view = at_depth(in_units_of_255(pixels.array), deep=False)
    return Image.fromarray(np.ascontiguousarray(recoloured(view, 3).transpose(1, 2, 0)))


def _to_array(image: Image.Image) -> View:
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.ascontiguousarray(array)

"""From an opened image to a view of a fixed size, uint8; and the only place that decodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BICUBIC = Image.Resampling.BICUBIC
View = np.ndarray  # uint8 [channels height width]


class UnreadableImage(Exception):
    """The image cannot be decoded, or is too small to be of use."""


def training_view(
    image: Image.Image,
    size: tuple[int, int],
    channels: int,
    rng: np.random.Generator,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    min_side: int = 1,
) -> View:
    """Random resized crop (bicubic) and horizontal flip; all choices are drawn from `rng`."""
    with _reading():
        _draft(image, size, channels, crop_scale[0])
        image = _decode(image, channels, min_side)
        box = random_crop(rng, image.width, image.height, crop_scale)
        view = image.resize((size[1], size[0]), BICUBIC, box=box)
        if flip and rng.random() < 0.5:
            view = ImageOps.mirror(view)
        return _to_array(view)


def augmented_view(
    image: Image.Image, channels: int, augment: Callable[[Image.Image], Any], min_side: int = 1
) -> View:
    """A view made by a transform of another library, from RGB (or RGBA) to an image of the size."""
    with _reading():
        # Those transforms know RGB; grey is turned back afterwards.
        view = augment(_decode(image, max(channels, 3), min_side))
        return _to_array(view.convert(MODES[channels]))


def evaluation_view(
    image: Image.Image, size: tuple[int, int], channels: int, min_side: int = 1
) -> View:
    """The largest centred box of the size's shape, resized (bicubic)."""
    with _reading():
        _draft(image, size, channels, 1.0)
        return _to_array(ImageOps.fit(_decode(image, channels, min_side), size[::-1], BICUBIC))


def random_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Box (left, top, right, bottom) of a random area and shape (3:4 to 4:3), within the image."""
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


class _reading:
    """Whatever a decoder raises on a broken file becomes UnreadableImage."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
            raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from error


def _draft(image: Image.Image, size: tuple[int, int], channels: int, smallest_crop: float) -> None:
    """Let a JPEG be decoded at a half, a quarter or an eighth where even the smallest crop of it
    still has the pixels that the view needs."""
    side = 1 / math.sqrt(smallest_crop)
    image.draft(MODES[channels], (math.ceil(size[1] * side), math.ceil(size[0] * side)))


def _decode(image: Image.Image, channels: int, min_side: int) -> Image.Image:
    if min(image.size) < min_side:
        raise UnreadableImage(
            f"{image.width}x{image.height} pixels, smaller than a patch of {min_side}"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255 rather than scale them.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert(MODES[channels])


def _to_array(image: Image.Image) -> View:
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.ascontiguousarray(array)

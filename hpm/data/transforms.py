"""Turn an opened image into a view of a fixed size: uint8, or float32 beyond 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps

from hpm.core.choices import Flip
from hpm.data.arrays import (
    Box,
    Opened,
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
from hpm.data.jpeg import JpegImage, decode_jpeg, exif_orientation, turned

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FLIPPED_AXES: dict[bool | Flip, tuple[int, ...]] = {
    True: (-1,),
    "horizontal": (-1,),
    "vertical": (-2,),
    "both": (-1, -2),
    "none": (),
    False: (),
}
MAX_ASPECT = 8  # of the sides; the ends of longer images are cut off before resizing
# The edges of a view within its image, as fractions of the image: (top, bottom, left, right). Along
# a flipped axis the larger comes first.
Crop = tuple[float, float, float, float]


@runtime_checkable
class Croppable(Protocol):
    """An image or a clip, decoded."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def resized(self, size: tuple[int, int], box: Box) -> View:
        """Crop to `box` and resize to `size` (height, width)."""
        ...


def training_view(
    pixels: Croppable,
    size: tuple[int, int],
    rng: np.random.Generator,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool | Flip = True,
) -> tuple[View, Crop]:
    """Random resized crop (bicubic) and flips; all choices are drawn from `rng`."""
    with reading():
        box = random_crop(rng, pixels.width, pixels.height, crop_scale)
        return cropped_view(pixels, size, box, rng, flip)


def cropped_view(
    pixels: Croppable,
    size: tuple[int, int],
    box: Box,
    rng: np.random.Generator,
    flip: bool | Flip = True,
) -> tuple[View, Crop]:
    """A box, resized (bicubic) and flipped at random. The frames of a clip are flipped alike."""
    with reading():
        view = pixels.resized(size, box)
        left, top, right, bottom = box
        edges = {
            -2: (top / pixels.height, bottom / pixels.height),
            -1: (left / pixels.width, right / pixels.width),
        }
        flipped = [axis for axis in FLIPPED_AXES[flip] if rng.random() < 0.5]
        for axis in flipped:
            edges[axis] = edges[axis][::-1]
        if flipped:
            view = torch.from_numpy(view).flip(flipped).numpy()  # 3 times faster than NumPy's flip
        return view, (*edges[-2], *edges[-1])


def augmented_view(
    image: Opened,
    channels: int,
    augment: Callable[[Image.Image], Any],
    min_side: int = 1,
) -> View:
    """A view made by another library's transform, which takes an RGB image."""
    # Such transforms expect 8-bit RGB; grey is converted back afterwards.
    pixels = decode(image, max(channels, 3), None, min_side)
    with reading():
        view = augment(_to_image(pixels)).convert(MODES[channels])
        return _channels_first(np.asarray(view)).copy()


def evaluation_view(
    image: Opened,
    size: tuple[int, int],
    channels: int,
    min_side: int = 1,
    crop_share: float = 1.0,
) -> View:
    """Centre crop at `size` (height, width), bicubic.

    With crop_share 1, the largest centred box of that shape is cropped and resized. Below 1, as in
    published recipes (224 = 0.875 * 256): the shorter side is resized to size / crop_share, then
    the centre is cropped.
    """
    least = resized_size(size, size, crop_share)
    return centre_view(decode(image, channels, least, min_side), size, crop_share)


def centre_view(pixels: Croppable, size: tuple[int, int], crop_share: float = 1.0) -> View:
    """The view of evaluation_view of an image or a clip that is decoded."""
    with reading():
        if crop_share == 1:
            return pixels.resized(size, centred_box(pixels.width, pixels.height, size))
        return _resize_then_crop(pixels, size, crop_share)


def resized_size(
    image: tuple[int, int], size: tuple[int, int], crop_share: float
) -> tuple[int, int]:
    """(height, width) that an image is resized to before a view of `size` is cropped: the smallest
    that covers size / crop_share, rounded down as torchvision does."""
    (height, width), (rows, columns) = image, (int(side / crop_share) for side in size)
    if rows * width >= columns * height:
        return rows, rows * width // height
    return columns * height // width, columns


def _resize_then_crop(pixels: Croppable, size: tuple[int, int], crop_share: float) -> View:
    rows, columns = size
    # A very long image, resized whole, could fill the memory: resize only its middle.
    box = _centred(
        pixels.width,
        pixels.height,
        min(pixels.width, MAX_ASPECT * pixels.height * columns / rows),
        min(pixels.height, MAX_ASPECT * pixels.width * rows / columns),
    )
    left, top, right, bottom = box
    height, width = resized_size((bottom - top, right - left), size, crop_share)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    view = pixels.resized((height, width), box)
    return np.ascontiguousarray(view[..., top : top + rows, left : left + columns])


def centred_box(width: int, height: int, size: tuple[int, int]) -> Box:
    """The largest centred box of the shape of `size` (height, width), in whole pixels."""
    ratio = size[1] / size[0]
    w, h = (ratio * height, height) if width / height >= ratio else (width, width / ratio)
    return _centred(width, height, w, h)


def _centred(width: int, height: int, w: float, h: float) -> Box:
    w, h = max(1, round(w)), max(1, round(h))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> Box:
    """A box of random area and aspect ratio (3:4 to 4:3) within the image."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # No such box fits, for example in a very long image: use the largest centred one.
    return _centred(width, height, min(width, height * 4 / 3), min(height, width * 4 / 3))


def least_size(size: tuple[int, int], smallest_crop: float) -> tuple[int, int]:
    """The least (height, width) of an image whose smallest crop has at least `size` pixels."""
    side = 1 / math.sqrt(smallest_crop)
    return math.ceil(size[0] * side), math.ceil(size[1] * side)


def decode(
    image: Opened,
    channels: int,
    least: tuple[int, int] | None = None,
    min_side: int = 1,
) -> Pixels:
    """Decode an image, upright. If `least` (height, width) suffices, a JPEG may be decoded at 1/2,
    1/4 or 1/8 of its size, which is faster."""
    with reading():
        pixels = _decoded(image, channels, least)
        check_side(pixels, min_side)
        return pixels


def check_side(pixels: Croppable, min_side: int) -> None:
    """Raise UnreadableImage if it is smaller than a patch."""
    if min(pixels.width, pixels.height) < min_side:
        raise UnreadableImage(
            f"{pixels.width}x{pixels.height} pixels, smaller than a patch of {min_side}"
        )


def _decoded(image: Opened, channels: int, least: tuple[int, int] | None) -> Pixels:
    if isinstance(image, JpegImage):
        array = decode_jpeg(image, channels, least)
        if array is not None:
            return Pixels(array, channels)
        image = image.opened()
    if channels == 4 and has_four_bands(image):
        # As stored: Pillow would divide the colours by a premultiplied alpha.
        image.tile = [
            tile._replace(args=("RGBA", *rest)) if raw == "RGBa" else tile
            for tile, (raw, *rest) in ((tile, tuple(tile.args or ("",))) for tile in image.tile)
        ]
        return Pixels(_channels_first(np.asarray(ImageOps.exif_transpose(image))), channels)
    if isinstance(image, Image.Image) and not is_deep(image) and channels in MODES:
        return Pixels(_by_pillow(image, channels, least), channels, transparent=channels == 4)
    if isinstance(image, Image.Image):
        ImageOps.exif_transpose(image, in_place=True)
        image = from_pillow(image)
    return image.pixels(channels)


def has_four_bands(image: Opened) -> TypeGuard[ImageFile.ImageFile]:
    """Is it a TIFF of four bands? The fourth may be anything (such as near infrared), even if it is
    called alpha."""
    return isinstance(image, ImageFile.ImageFile) and (
        image.format == "TIFF" and image.mode in ("RGBA", "RGBa", "RGBX")
    )


def _by_pillow(image: Image.Image, channels: int, least: tuple[int, int] | None) -> np.ndarray:
    height, width = turned(least, exif_orientation(image)) if least else image.size[::-1]
    # Even at full size: `draft` makes Pillow read a colour JPEG's stored luminance as grey.
    image.draft(MODES[channels], (width, height))
    return _channels_first(np.asarray(ImageOps.exif_transpose(image).convert(MODES[channels])))


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _to_image(pixels: Pixels) -> Image.Image:
    """An RGB or RGBA image of 8 bits."""
    view = at_depth(in_units_of_255(pixels.array), deep=False)
    if len(view) != pixels.channels:
        view = recoloured(view, pixels.channels)
    return Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))

"""Shrink and encode the images of `hpm prepare`."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps

from hpm.core.extras import need
from hpm.data.arrays import ArrayImage, Opened, Pixels, View, from_pillow, is_deep, reading
from hpm.data.jpeg import JpegImage
from hpm.data.opening import open_image
from hpm.data.sources import Source
from hpm.data.transforms import decode, has_four_bands


def shrunk(source: Source, index: int, size: int, quality: int, channels: int) -> bytes:
    """Encode an image, shrunk so that its shorter side is at most `size`.

    A file that is small enough is returned unchanged. Otherwise the result is JPEG; PNG for images
    with transparency; TIFF for those of more than 8 bits and for the four bands of a TIFF; `.npy`
    where the channels may mean anything. Raises UnreadableImage or OSError.
    """
    data = source.read(index)
    image = source.open(index) if data is None else open_image(io.BytesIO(data))
    if isinstance(image, ArrayImage) or is_deep(image):
        return _shrunk_array(image, data, size, channels)
    with reading():
        found = _channels(image.opened() if isinstance(image, JpegImage) else image)
    bands = has_four_bands(image)
    # Decode even if the file is returned unchanged, to find broken files now.
    pixels = decode(image, found, (size, size))
    if channels != 4:  # alpha will not be used, so the colours under it must stay
        pixels = dataclasses.replace(pixels, transparent=False)
    short = min(pixels.width, pixels.height)
    if data is not None and min(image.size) <= size:
        return data
    factor = min(1.0, size / short)
    shape = max(1, round(pixels.height * factor)), max(1, round(pixels.width * factor))
    view = pixels.resized(shape, (0, 0, pixels.width, pixels.height)) if factor < 1 else None
    array = pixels.array if view is None else view
    if bands:  # in a PNG, the fourth would be alpha
        return _tiff(array)
    colours = array[0] if found == 1 else array.transpose(1, 2, 0)
    file = io.BytesIO()
    lossless = found == 4 or (data is None and factor == 1)
    Image.fromarray(np.ascontiguousarray(colours)).save(
        file, "png" if lossless else "jpeg", quality=quality
    )
    return file.getvalue()


def _channels(image: Image.Image) -> int:
    if image.mode in ("1", "L"):
        return 1
    return 4 if image.has_transparency_data else 3


def _shrunk_array(image: Opened, data: bytes | None, size: int, channels: int) -> bytes:
    assert not isinstance(image, JpegImage)
    if isinstance(image, Image.Image):
        with reading():
            ImageOps.exif_transpose(image, in_place=True)
            image, channels = from_pillow(image), 1
    pixels = image.pixels(channels)
    short = min(pixels.width, pixels.height)
    if short <= size and data is not None:
        return data
    array, kind = pixels.array, pixels.array.dtype
    factor = min(1.0, size / short)
    shape = max(1, round(pixels.height * factor)), max(1, round(pixels.width * factor))
    whole = Pixels(array, len(array))  # keep all channels
    view = whole.resized(shape, (0, 0, pixels.width, pixels.height))
    if kind.str[1:] == "u2":
        view = (view * 257).round().astype(np.uint16)
    elif view.dtype != np.uint8:
        view = view / np.float32(255)  # back to the file's units
    if image.colours:
        return _tiff(view)
    file = io.BytesIO()
    np.save(file, view[0] if len(view) == 1 else np.ascontiguousarray(view.transpose(1, 2, 0)))
    return file.getvalue()


def _tiff(view: View) -> bytes:
    """Grey or RGB, with alpha or without [C H W], as a TIFF that says so: when it is read, it can
    be converted to another number of channels."""
    file = io.BytesIO()
    array = np.ascontiguousarray(view.transpose(1, 2, 0))
    if len(view) == 1 or view.dtype == np.uint8:
        Image.fromarray(array[..., 0] if len(view) == 1 else array).save(file, "tiff")
        return file.getvalue()
    need("tifffile", "multichannel", "hpm prepare on images of more than 8 bits").imwrite(
        file,
        array,
        photometric="minisblack" if len(view) == 2 else "rgb",
        planarconfig="contig",
        extrasamples=["unassalpha"] if len(view) in (2, 4) else None,
        metadata=None,
    )
    return file.getvalue()

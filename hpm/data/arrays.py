"""Open image files, including those that Pillow has no mode for: any number of channels, more than
8 bits, `.npy`.

Units: full scale is 255 in a view, whatever the file holds. Unsigned 8 and 16 bits (and bool) are
scaled by their own full scale. Signed and floating-point values are not scaled, 1 being full scale:
any unit works, since mean and standard deviation are measured."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hpm.core.errors import counted, one_line
from hpm.data.jpeg import JpegImage, upright

BICUBIC = Image.Resampling.BICUBIC

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

ALPHA = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha

BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # raised by Pillow

LZW = 5  # a TIFF compression

LARGEST = 1e30  # magnitude of a floating-point pixel; beyond it, float32 sums overflow

LUMA = np.array([299, 587, 114], np.float32) / 1000  # Pillow's weights of RGB in grey

View = np.ndarray  # [channels height width], uint8 or float32, on a scale of 0 to 255

File = str | Path | io.BytesIO

Box = tuple[int, int, int, int]  # left, top, right, bottom; in pixels

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")

# Both log every unreadable file to stderr; UnreadableImage reports it instead.
for _name in ("PIL", "tifffile"):
    logging.getLogger(_name).addHandler(logging.NullHandler())


class UnreadableImage(Exception):
    """The image cannot be decoded, has the wrong number of channels, or is too small."""


@contextmanager
def reading(errors: tuple[type[Exception], ...] = BROKEN) -> Iterator[None]:
    """Turn a decoder's errors on broken files into UnreadableImage."""
    try:
        yield
    except UnreadableImage:
        raise
    except errors as error:
        raise UnreadableImage(one_line(error) or type(error).__name__) from error


@dataclass(frozen=True)
class ArrayImage:
    """An image as an array, not decoded yet.

    axes: meaning of each axis, of Y, X and C; empty if the file does not say.
    colours: the channels are grey or RGB, perhaps with alpha, and can be converted into each other;
        those of other images may mean anything.
    orientation: as in EXIF, of the array as stored; 1 is upright.
    """

    load: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str
    colours: bool = False
    orientation: int = 1

    @property
    def deep(self) -> bool:
        """Does it hold more than 8 bits?"""
        return _kind(self.dtype) not in ("u1", "b1")

    def pixels(self, channels: int) -> Pixels:
        """Decode. Raises UnreadableImage for a wrong number of channels or unusable values."""
        self._check_size()
        axes = self.axes or _guess_axes(self.shape, channels)
        if sorted(axes) not in (["X", "Y"], ["C", "X", "Y"]):
            raise UnreadableImage(f"{_times(self.shape)} values, which is not one image")
        found = self.shape[axes.index("C")] if "C" in axes else 1
        if found != channels and not (self.colours and channels in (1, 3, 4) and found <= 4):
            raise UnreadableImage(f"{counted(found, 'channel')} instead of {channels}")
        array = self._decoded()
        array = np.moveaxis(array, axes.index("C"), 0) if "C" in axes else array[None]
        array = array.swapaxes(1, 2) if axes.index("X") < axes.index("Y") else array
        return Pixels(upright(array, self.orientation), channels)

    def _check_size(self) -> None:
        if self.dtype.kind not in "biuf":
            raise UnreadableImage(f"values of type {self.dtype} cannot be pixels")
        # The same limit as Pillow's, so that a broken or hostile header cannot fill the memory.
        limit = 2 * 4 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf
        if not 0 < math.prod(self.shape) <= limit:
            raise UnreadableImage(f"{_times(self.shape)} values, not between 1 and {limit}")

    def _decoded(self) -> np.ndarray:
        with reading((Exception,)):
            array = self.load()
        if array.shape != self.shape:
            raise UnreadableImage(
                f"{_times(array.shape)} values, but its header says {_times(self.shape)}"
            )
        if array.dtype.kind == "f":
            # Checked on the whole image: whether it is readable must not depend on the crop.
            low, high = float(array.min()), float(array.max())
            if not -LARGEST < low <= high < LARGEST:  # also true for NaN
                raise UnreadableImage("some pixels are NaN, infinite or out of range")
        return array


@dataclass(frozen=True)
class Pixels:
    """Decoded pixels.

    array: [channels in the file, height, width], in any memory order, possibly a memory-mapped
    file. channels: number of channels of a view. transparent: the last channel is alpha.
    """

    array: np.ndarray
    channels: int
    transparent: bool = False

    @property
    def width(self) -> int:
        return self.array.shape[2]

    @property
    def height(self) -> int:
        return self.array.shape[1]

    def resized(self, size: tuple[int, int], box: Box) -> View:
        """Crop to `box` and resize to `size` (height, width)."""
        left, top, right, bottom = box
        part = in_units_of_255(self.array[:, top:bottom, left:right])
        if self.transparent:
            # Pillow weights colours by alpha when it resizes.
            image = Image.fromarray(np.ascontiguousarray(part.transpose(1, 2, 0)))
            return np.asarray(image.resize(size[::-1], BICUBIC)).transpose(2, 0, 1).copy()
        view = resize(part, size)
        if _kind(self.array.dtype) == "u2":
            view = view.clip(0, 255)  # the filter overshoots at edges
        return view if len(view) == self.channels else recoloured(view, self.channels)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> View:
    """Resize [C H W], uint8 or float32, to `size` (height, width): bicubic, antialiased.

    uint8 uses PyTorch, which is four times as fast as Pillow with the same filter; float32 uses
    Pillow, which is as fast and more precise (PyTorch's error is 1e-5). PyTorch 2.13 fails for an
    output of one pixel.
    """
    if pixels.dtype != np.uint8 or size == (1, 1):
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in pixels]
        return np.stack([np.asarray(band.resize(size[::-1], BICUBIC)) for band in bands])
    if not pixels.flags.writeable or min(pixels.strides) < 0:
        pixels = pixels.copy(order="K")  # torch.from_numpy needs writable, positive strides
    resized = F.interpolate(torch.from_numpy(pixels)[None], size, mode="bicubic", antialias=True)
    return resized[0].contiguous().numpy()


Opened = Image.Image | JpegImage | ArrayImage


def is_deep(image: Opened) -> bool:
    """Does the image hold more than 8 bits a channel?"""
    if isinstance(image, JpegImage):
        return False
    return image.deep if isinstance(image, ArrayImage) else image.mode in DEEP_MODES


def from_pillow(image: Image.Image) -> ArrayImage:
    """Convert an image whose mode cannot be used for a view directly."""
    bands = image.getbands()
    whole = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        whole = whole.astype(np.uint16)  # older versions of Pillow open 16-bit grey as "I"
    grey = image.mode in ("1", "L", *DEEP_MODES)
    axes = "YX" if len(bands) == 1 else "YXC"
    return ArrayImage(lambda: whole, whole.shape, whole.dtype, axes, colours=grey)


def in_units_of_255(array: np.ndarray) -> np.ndarray:
    """uint8 unchanged, all else as float32 on a scale of 0 to 255 (see the top of this file)."""
    kind = _kind(array.dtype)
    if kind == "u1":
        return array
    if kind == "b1":
        return array.astype(np.uint8) * np.uint8(255)
    scale = 1 / 257 if kind == "u2" else 255
    return array.astype(np.float32) * np.float32(scale)


def at_depth(view: View, deep: bool) -> View:
    """Convert to float32 if deep, else to uint8: all views of a source have one dtype."""
    if deep:
        return view.astype(np.float32, copy=False)
    return view if view.dtype == np.uint8 else view.round().clip(0, 255).astype(np.uint8)


def recoloured(view: View, channels: int) -> View:
    """Convert between grey, grey with alpha, RGB and RGBA, as Pillow does."""
    alphas = view[-1:] if len(view) in (2, 4) else np.full_like(view[:1], 255)
    colours = view[: len(view) - (len(view) in (2, 4))]
    if channels == 1 and len(colours) == 3:
        grey = np.tensordot(LUMA, colours, 1)[None]
        return grey if view.dtype != np.uint8 else at_depth(grey, deep=False)
    if channels > 1 and len(colours) == 1:
        colours = colours.repeat(3, 0)
    return np.concatenate([colours, alphas]) if channels == 4 else colours


def _guess_axes(shape: tuple[int, ...], channels: int) -> str:
    """[H W], [H W C] or [C H W]: C is the axis whose length is `channels`."""
    if len(shape) != 3:
        return {2: "YX"}.get(len(shape), "?")
    first, last = shape[0] == channels, shape[2] == channels
    if first and last:
        raise UnreadableImage(f"{_times(shape)} values: first or last axis may be the channels")
    if not first and not last:
        first = shape[0] < shape[2]  # the shorter one, for the error message
    return "CYX" if first else "YXC"


def _kind(dtype: np.dtype) -> str:
    """The dtype without byte order: `u2` for unsigned 16 bits."""
    return dtype.str[1:]


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

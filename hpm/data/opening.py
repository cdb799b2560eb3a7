"""Open image files: 8-bit pictures by their decoders, .npy and TIFF as arrays."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.data.arrays import (
    ALPHA,
    JPEG_SUFFIXES,
    LZW,
    ArrayImage,
    File,
    Opened,
    UnreadableImage,
    reading,
)
from hpm.data.jpeg import QUARTER_TURNS, START, JpegImage
from hpm.data.pillow import open_by_pillow

ORIENTATION = 274  # a TIFF tag, with the values of EXIF
GREY, RGB = (1, 1), (2, 3)  # TIFF's PhotometricInterpretation, and number of samples without alpha


def open_image(file: File) -> Opened:
    """Open an image file (or its bytes) without decoding it, with Pillow unless it would lose data.

    Raises UnreadableImage.
    """
    with reading((Exception,)):  # decoders have error classes of their own
        if not isinstance(file, io.BytesIO) and Path(file).suffix.lower() in JPEG_SUFFIXES:
            file = io.BytesIO(Path(file).read_bytes())  # the fast decoder reads memory
        head = _head(file)
        if isinstance(file, io.BytesIO) and head.startswith(START):
            return JpegImage(file.getvalue())
        if head.startswith(b"\x93NUMPY"):
            return _open_npy(file)
        if head.startswith(b"\x89PNG") and head[24] == 16 and head[25] > 0:
            return _open_colour_png(file, head)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _open_tiff(file)
        try:
            return open_by_pillow(_rewound(file))
        except UnidentifiedImageError:
            # Pillow's message names the file, which is known, or an address in memory.
            raise UnreadableImage("cannot identify what kind of image this is") from None


def _head(file: File) -> bytes:
    """The first 32 bytes; empty for suffixes that Pillow always handles."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:32]
    if Path(file).suffix.lower() not in (".npy", ".png", ".tif", ".tiff"):
        return b""
    with open(file, "rb") as opened:
        return opened.read(32).ljust(32, b"\0")


def _open_npy(file: File) -> ArrayImage:
    # Memory-mapped: unless it is floating point, only the pages of the crop are read.
    mode: Any = None if isinstance(file, io.BytesIO) else "r"
    array = np.load(_rewound(file), mmap_mode=mode, allow_pickle=False)
    return ArrayImage(lambda: array, array.shape, array.dtype, "")


def _open_colour_png(file: File, head: bytes) -> ArrayImage:
    """A 16-bit PNG with alpha or colours, which Pillow would reduce to 8 bits."""
    codecs = _need("imagecodecs", "PNG of 16-bit colours")
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    shape = (height, width, {2: 3, 4: 2, 6: 4}[head[25]])
    return ArrayImage(
        lambda: codecs.png_decode(_content(file)), shape, np.dtype(np.uint16), "YXC", colours=True
    )


def _open_tiff(file: File) -> Image.Image | ArrayImage:
    """Open with Pillow if it keeps all channels, bits and pages, else with tifffile."""
    with suppress(UnidentifiedImageError):
        image: Any = open_by_pillow(_rewound(file))
        bands = len(image.getbands())
        samples, bits = image.tag_v2.get(277, 1), max(image.tag_v2.get(258, (1,)))
        pages = bands == 1 and image.is_animated  # each channel is stored as a page
        if samples == bands and not pages and (bits <= 8 or bands == 1 or image.mode == "CMYK"):
            # Pillow 13 scrambles the pixels of a file that it maps into memory and turns.
            turns = image.tag_v2.get(ORIENTATION, 1) in QUARTER_TURNS
            return open_by_pillow(io.BytesIO(_content(file))) if turns else image
    tifffile = _need("tifffile", "TIFF of more than RGB in 8 bits")
    codecs = _need("imagecodecs", "TIFF of more than RGB in 8 bits")

    def load() -> np.ndarray:
        if page.compression == LZW:
            # Use libtiff: tifffile's decoder crashes the process on damaged files.
            return codecs.tiff_decode(_content(file), index=None if len(series) > 1 else 0)
        with tifffile.TiffFile(_rewound(file)) as tiff:
            # One thread, since several workers load in parallel.
            return tiff.series[0].asarray(maxworkers=1)

    with tifffile.TiffFile(_rewound(file)) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        axes = "".join(axis if axis in "YX" else "C" for axis in series.axes)
        meaning = page.photometric, page.samplesperpixel - len(page.extrasamples)
        alpha = len(page.extrasamples) <= 1 and all(int(e) in ALPHA for e in page.extrasamples)
        colours = axes == "YX" or (meaning in (GREY, RGB) and alpha)
        orientation = page.tags.valueof(ORIENTATION, 1)
        return ArrayImage(load, series.shape, series.dtype, axes, colours, orientation)


def _need(module: str, job: str) -> ModuleType:
    try:
        return need(module, "multichannel", job)
    except UserError as error:
        # Count it as an unreadable image: this may run in a worker.
        raise UnreadableImage(str(error)) from None


def _rewound(file: File) -> File:
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return file


def _content(file: File) -> bytes:
    return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()

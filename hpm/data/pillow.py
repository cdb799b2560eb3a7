"""Open images with a safe subset of Pillow's decoders.

Some of the others run external programs: an Encapsulated PostScript file, whatever its name, is
passed to Ghostscript.
"""

from __future__ import annotations

import functools
import io
from importlib.util import find_spec
from pathlib import Path

from PIL import AvifImagePlugin, Image

# The first reads MPO, too.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF")
HEIC = "HEIF"  # pillow-heif's name of it
READS_HEIC = find_spec("pillow_heif") is not None

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several processes load in parallel


def open_by_pillow(file: str | Path | io.BytesIO) -> Image.Image:
    """Open an image without decoding it. Raises UnidentifiedImageError for other formats."""
    return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    if not READS_HEIC:
        return FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, decode_threads=1)
    return (*FORMATS, HEIC)

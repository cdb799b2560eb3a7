"""Pillow's decoders of images, and none of the others that it has.

Some of those hand the file to other programs: Encapsulated PostScript goes to Ghostscript, whatever
the file is called.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # the first reads MPO, too


def open_by_pillow(file: str | Path | io.BytesIO) -> Image.Image:
    """An image, not decoded yet. Raises UnidentifiedImageError for everything else."""
    return Image.open(file, formats=FORMATS)

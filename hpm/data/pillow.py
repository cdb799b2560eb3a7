"""Open images with a safe subset of Pillow's decoders.

Some of the others run external programs: an Encapsulated PostScript file, whatever its name, is
passed to Ghostscript.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # the first reads MPO, too


def open_by_pillow(file: str | Path | io.BytesIO) -> Image.Image:
    """Open an image without decoding it. Raises UnidentifiedImageError for other formats."""
    return Image.open(file, formats=FORMATS)

"""Image files in a folder and its subfolders; other files are counted."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from hpm.core.errors import why
from hpm.data.arrays import JPEG_SUFFIXES
from hpm.data.notes import say_once

IMAGE_SUFFIXES = (
    *JPEG_SUFFIXES,
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".npy",
)
# Known, but not read: what they are, by suffix.
OTHER_KINDS = {
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl", ".jp2"), "images"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"), "raw"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"), "videos"),
}
HINTS = {
    "images": "convert images to JPEG or PNG (magick mogrify -format jpg *.heic)",
    "raw": "convert raw photographs to JPEG or TIFF",
    "videos": "take frames from videos (ffmpeg -i clip.mp4 -vf fps=1 frame_%04d.jpg)",
}
# Where the images of an annotated data set lie, and what lies beside them.
ANNOTATED_NAMES = ("images", "jpegimages")
ANNOTATION_NAMES = (
    "masks",
    "annotations",
    "labels",
    "segmentationclass",
    "segmentationobject",
)


def images_of(folder: Path) -> Path:
    """The folder of images inside of an annotated data set, whose masks are no images to train on;
    `folder` itself where it is none."""
    inside = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    images = next((inside[name] for name in ANNOTATED_NAMES if name in inside), None)
    beside = [inside[name].name for name in ANNOTATION_NAMES if name in inside]
    if images is None or not beside:
        return folder
    say_once(f"{folder}: reading the images in {images.name}, not those in {', '.join(beside)}")
    return images


def described(others: Counter[str]) -> str:
    """`12 .heic, 3 .mp4: ` and how to turn them into images."""
    hints = dict.fromkeys(HINTS[OTHER_KINDS[suffix]] for suffix in sorted(others))
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    return f"{counts}: {'; '.join(hints)}"


def find_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Relative paths, sorted, and how many files of other kinds there are, by suffix; links are
    followed, but no folder is entered twice, and no masks beside their images."""
    found, seen = [], set()
    others: Counter[str] = Counter()

    def pass_over(error: OSError) -> None:
        say_once(f"{error.filename}: {why(error)}, passed over")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=pass_over):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        annotated = any(s.lower() in ANNOTATED_NAMES for s in subfolders)
        subfolders[:] = sorted(
            s
            for s in subfolders
            if not s.startswith(".") and not (annotated and s.lower() in ANNOTATION_NAMES)
        )
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(IMAGE_SUFFIXES):
                found.append(os.path.relpath(os.path.join(folder, file), root))
            elif (suffix := os.path.splitext(file)[1].lower()) in OTHER_KINDS:
                others[suffix] += 1
    return sorted(found), others

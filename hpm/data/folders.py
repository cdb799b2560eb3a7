"""Find image files in a folder and its subfolders; other files are counted."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpm.core.errors import why
from hpm.data.arrays import JPEG_SUFFIXES
from hpm.data.notes import say_once
from hpm.data.pillow import READS_HEIC

HEIC_SUFFIXES = (".heic", ".heif")
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
    ".avif",
    *(HEIC_SUFFIXES if READS_HEIC else ()),
)
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".webm",
    ".mkv",
    ".avi",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ogv",
    ".3gp",
)
# Kinds of files that are recognised but not read, by suffix.
OTHER_KINDS = {
    **dict.fromkeys(HEIC_SUFFIXES, "heic"),
    **dict.fromkeys((".jxl", ".jp2"), "images"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"), "raw"),
    **dict.fromkeys(VIDEO_SUFFIXES, "videos"),
}
HINTS = {
    "heic": "for HEIC, pip install 'hpm-vision[heic]'",
    "images": "convert images to JPEG or PNG (magick mogrify -format jpg *.jxl)",
    "raw": "convert raw photographs to JPEG or TIFF",
    "videos": "take frames from videos (ffmpeg -i clip.mp4 -vf fps=1 frame_%04d.jpg), or train "
    "on a folder of videos alone",
}
# Folders of images and of annotations in an annotated data set.
ANNOTATED_NAMES = ("images", "jpegimages")
ANNOTATION_NAMES = (
    "masks",
    "annotations",
    "labels",
    "segmentationclass",
    "segmentationobject",
)


def images_of(folder: Path) -> Path:
    """The image folder of an annotated data set, so that masks are not used as training images;
    otherwise `folder` itself."""
    inside = {p.name.lower(): p for p in subfolders(folder)}
    images = next((inside[name] for name in ANNOTATED_NAMES if name in inside), None)
    beside = [inside[name].name for name in ANNOTATION_NAMES if name in inside]
    if images is None or not beside:
        return folder
    say_once(f"{folder}: reading the images in {images.name}, not those in {', '.join(beside)}")
    return images


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted. Raises OSError."""
    # A listing tells what is a file. To ask for each of millions would take minutes on a network
    # file system.
    with os.scandir(folder) as entries:
        found = [
            folder / entry.name
            for entry in entries
            if entry.is_dir(follow_symlinks=False) or entry.is_symlink()
        ]
    return sorted(path for path in found if path.is_dir())


def files_below(folder: Path, suffix: str) -> list[Path]:
    """All files with this suffix in a folder and its subfolders, sorted."""
    # `Path.rglob` lists each folder twice, into objects of 200 bytes for each of millions of files.
    return sorted(
        Path(inside, name)
        for inside, _, names in os.walk(folder)
        for name in names
        if name.endswith(suffix)
    )


def labels_by_folder(
    files: Sequence[str], separator: str = os.sep
) -> tuple[np.ndarray | None, list[str]]:
    """(labels, classes) from the first-level folders of relative paths; (None, []) unless every
    file is in one."""
    tops = [sys.intern(file.split(separator, 1)[0]) for file in files if separator in file]
    if not tops or len(tops) < len(files):
        return None, []
    classes = sorted(set(tops))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[top] for top in tops]), classes


def described(others: Counter[str]) -> str:
    """Counts by suffix, and how to convert such files: `12 .heic: convert images to ...`."""
    hints = dict.fromkeys(HINTS[OTHER_KINDS[suffix]] for suffix in sorted(others))
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    return f"{counts}: {'; '.join(hints)}"


def find_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Sorted relative paths of images, and counts of OTHER_KINDS by suffix."""
    return find_files(root, IMAGE_SUFFIXES, tuple(OTHER_KINDS))


def find_files(
    root: Path, suffixes: tuple[str, ...], other_suffixes: tuple[str, ...]
) -> tuple[list[str], Counter[str]]:
    """Sorted relative paths of files, and counts of others by suffix.

    Follows links, but enters no folder twice. Skips hidden files and annotation folders.
    """
    found, visited = [], set()
    others: Counter[str] = Counter()

    def pass_over(error: OSError) -> None:
        say_once(f"{error.filename}: {why(error)}, passed over")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=pass_over):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        annotated = any(s.lower() in ANNOTATED_NAMES for s in subfolders)
        subfolders[:] = sorted(
            s
            for s in subfolders
            if not s.startswith(".") and not (annotated and s.lower() in ANNOTATION_NAMES)
        )
        below = os.path.relpath(folder, root)
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(suffixes):
                found.append(file if below == os.curdir else os.path.join(below, file))
            elif (suffix := os.path.splitext(file)[1].lower()) in other_suffixes:
                others[suffix] += 1
    return sorted(found), others

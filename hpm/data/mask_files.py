"""Mask files: pairing them with images, and mapping their numbers to classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from hpm.core.errors import UserError, counted, one_line
from hpm.data.arrays import JPEG_SUFFIXES, ArrayImage, UnreadableImage, reading
from hpm.data.folders import find_images
from hpm.data.opening import open_image

IGNORED = 255  # label of pixels that training and metrics ignore
MASK_ENDINGS = ("", "_mask", "_label", "_labels", "_L")  # added to the name of the image
UNKNOWN = -1  # in Labels.table: a number that is no class


@dataclass(frozen=True)
class Labels:
    """Maps the numbers in mask files to class indices.

    names: class names, in order. table: int16 [256], the class index of each number, IGNORED or
    UNKNOWN. one_class: map every number above 0 to class 1.
    """

    names: list[str]
    table: np.ndarray
    one_class: bool = False

    @staticmethod
    def of(
        names: Mapping[int, str], ignored: Iterable[int | None], one_class: bool = False
    ) -> Labels:
        """Build from class names by number; ignored numbers are not classes."""
        unused = {number for number in ignored if number is not None}
        kept = sorted(number for number in names if number not in unused)
        if len(kept) < 2 or not 0 <= kept[0] <= kept[-1] < IGNORED:
            raise UserError(
                f"masks of {counted(len(kept), 'class', 'classes')}: there must be two or more, "
                f"with labels from 0 to {IGNORED - 1} ({IGNORED} is ignored)"
            )
        table = np.full(256, UNKNOWN, np.int16)
        table[IGNORED] = IGNORED
        table[kept] = np.arange(len(kept))
        table[[number for number in unused if 0 <= number <= IGNORED]] = IGNORED
        return Labels([names[number] for number in kept], table, one_class)

    def apply(
        self, numbers: Integer[np.ndarray, "height width"], file: str
    ) -> UInt8[np.ndarray, "height width"]:
        """Map numbers to class indices. Raises UserError, naming the file, for an unknown one."""
        if self.one_class:
            ignored = [k for k in np.flatnonzero(self.table == IGNORED).tolist() if k != IGNORED]
            return np.where(np.isin(numbers, ignored), IGNORED, numbers > 0).astype(np.uint8)
        low, high = int(numbers.min()), int(numbers.max())
        if 0 <= low <= high <= IGNORED:
            labels = self.table[numbers]
            if labels.min() >= 0:
                return labels.astype(np.uint8)
        known = np.flatnonzero(self.table >= 0)
        wrong = np.setdiff1d(numbers, known)
        known = known[self.table[known] != IGNORED]
        raise UserError(
            f"{file}: label {wrong[0]} is none of the {len(self.names)} classes' ({known[0]} to "
            f"{known[-1]}): correct the mask, name all classes in classes.txt, or ignore a label"
        )


def read_mask(file: Path | str) -> Integer[np.ndarray, "height width"]:
    """Read the numbers in a mask file; with a palette, the indices rather than the colours.

    Raises UnreadableImage if it is not an image, UserError if it holds colours.
    """
    try:
        image = open_image(file)
        with reading():
            if isinstance(image, Image.Image) and len(image.getbands()) == 1:
                numbers = np.asarray(image)
            elif isinstance(image, Image.Image):
                numbers = np.empty((0, 0, len(image.getbands())), np.uint8)
            elif isinstance(image, ArrayImage):
                numbers = image.pixels(1).array[0]
            else:
                raise UserError(f"{file}: JPEG alters labels; save masks as PNG")
    except (UnreadableImage, OSError) as error:
        raise UnreadableImage(f"its mask {file}: {one_line(error)}") from None
    if numbers.ndim != 2 or numbers.dtype.kind not in "biu":
        raise UserError(
            f"{file}: a mask of colours or fractions; save masks as PNG with one number per pixel"
        )
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def highest_label(files: Collection[Path], ignored: Collection[int | None]) -> int:
    """The highest number in any of the files that is not ignored."""
    skipped = [number for number in ignored if number is not None]

    def highest(file: Path) -> int:
        try:
            numbers = np.unique(read_mask(file))
        except UnreadableImage:
            return -1  # counted while loading
        return max(np.setdiff1d(numbers, skipped).tolist(), default=-1)

    # Threads suffice: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return max(pool.map(highest, files), default=-1)


def pair_by_name(images: Path, masks: Path) -> tuple[list[Path], list[Path]]:
    """Pair images with masks of the same name, up to the suffix and MASK_ENDINGS.

    Raises UserError if an image or a mask has no counterpart.
    """
    image_files, mask_files = _by_name(images), _by_name(masks)
    if not image_files or not mask_files:
        raise UserError(f"{images if not image_files else masks}: no images in this folder")
    of_image = {name: _mask_name(name, mask_files) for name in image_files}
    missing = [image_files[name] for name, mask in of_image.items() if mask is None]
    if missing:
        raise UserError(
            f"{masks} has no mask for {missing[0]}{_others(missing)}; a mask has the name of its "
            "image"
        )
    spare = sorted(mask_files.keys() - of_image.values())
    if spare:
        raise UserError(
            f"{images} has no image for {mask_files[spare[0]]}{_others(spare)}; remove masks "
            "without an image"
        )
    lossy = [file for file in mask_files.values() if file.suffix.lower() in JPEG_SUFFIXES]
    if lossy:
        raise UserError(f"{lossy[0]}: JPEG alters labels; save masks as PNG")
    return list(image_files.values()), [mask_files[str(mask)] for mask in of_image.values()]


def _mask_name(name: str, masks: Collection[str]) -> str | None:
    return next((name + ending for ending in MASK_ENDINGS if name + ending in masks), None)


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in find_images(folder)[0]:
        name = os.path.splitext(file)[0]
        if name in found:
            raise UserError(f"{folder}: {found[name].name} and {Path(file).name} have one name")
        found[name] = folder / file
    return found


def _others(files: Collection[object]) -> str:
    return f" (and {counted(len(files) - 1, 'other')})" if len(files) > 1 else ""

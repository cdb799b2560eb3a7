"""Read and check COCO's JSON of boxes and masks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import UserError, counted
from hpm.data.inspection import spaced
from hpm.data.list_tables import MOST_CHECKED
from hpm.data.notes import say_once
from hpm.data.rle import check_segmentation

MARGIN = 2  # pixels that a box may reach out of its image, because of rounding
MAX_FAULTY_SHARE = 1e-3  # of the boxes; COCO itself has two empty ones among 860,001
PARTS = ("images", "annotations", "categories")


@dataclass
class CocoFile:
    """files: file name of each image. sizes: int64 [images 2], height and width. classes: names of
    the categories, in the order of their ids. objects: for each image a list of objects, each with
    bbox (x, y, width, height), area, iscrowd, segmentation (empty if there is none) and class (the
    class index)."""

    files: list[str]
    sizes: np.ndarray
    classes: list[str]
    objects: list[list[dict[str, Any]]] = field(default_factory=list)


def read_coco(file: Path, folder: Path) -> CocoFile:
    """Read the annotations of the images in `folder`. Raises UserError if they are wrong."""
    content = _parsed(file)
    images = _by_id(file, content["images"], "image")
    categories = dict(sorted(_by_id(file, content["categories"], "category").items()))
    if not categories:
        raise UserError(f"{file}: it defines no categories")
    found = CocoFile(
        [_file_name(file, image) for image in images.values()],
        np.array([_size(file, image) for image in images.values()], np.int64).reshape(-1, 2),
        [str(row.get("name", f"category {number}")) for number, row in categories.items()],
        [[] for _ in images],
    )
    _check_files(file, folder, found.files)
    places = {number: place for place, number in enumerate(images)}
    numbers = {category: number for number, category in enumerate(categories)}
    faulty: list[str] = []
    for annotation in content["annotations"]:
        what = f"{file}: annotation {_get(annotation, 'id')}"
        place = places.get(_get(annotation, "image_id"))
        if place is None:
            raise UserError(f"{what} is of image {_get(annotation, 'image_id')}, not in 'images'")
        number = numbers.get(_get(annotation, "category_id"))
        if number is None:
            raise UserError(
                f"{what} has category {_get(annotation, 'category_id')}, which 'categories' does "
                f"not define ({', '.join(map(str, list(numbers)[:8]))}, ...)"
            )
        height, width = (int(side) for side in found.sizes[place])
        if (fault := _fault(annotation.get("bbox"), height, width)) is not None:
            faulty.append(f"{what} of {found.files[place]}: {fault}")
            continue
        found.objects[place].append(_object(what, annotation, number, height, width))
    _report(file, faulty, len(content["annotations"]))
    return found


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file}{where}: not valid JSON; write or download it again") from None
    for part in PARTS:
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f"{file}: no list '{part}'; COCO's JSON has {', '.join(PARTS)}")
        if not all(isinstance(row, dict) for row in content[part]):
            raise UserError(f"{file}: '{part}' has entries that are not objects")
    if not content["images"]:
        raise UserError(f"{file}: it names no images")
    return content


def _by_id(file: Path, rows: Sequence[dict[str, Any]], what: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = _get(row, "id")
        if type(number) is not int:
            raise UserError(f"{file}: the id of a {what} is {number!r}, not a whole number")
        if number in found:
            raise UserError(f"{file}: '{what}' has two entries with the id {number}")
        found[number] = row
    return found


def _get(row: dict[str, Any], key: str) -> Any:
    value = row.get(key)
    return str(value) if isinstance(value, list | dict) else value


def _file_name(file: Path, image: dict[str, Any]) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: image {image['id']} has no file_name")
    return name


def _size(file: Path, image: dict[str, Any]) -> tuple[int, int]:
    height, width = image.get("height"), image.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise UserError(f"{file}: image {image['id']} has no height and width in pixels")
    return height, width


def _check_files(file: Path, folder: Path, names: list[str]) -> None:
    checked = [names[place] for place in spaced(len(names), MOST_CHECKED)]
    missing = [name for name in checked if not (folder / name).is_file()]
    if missing:
        of = f" of {len(checked):,} checked" if len(checked) < len(names) else ""
        more = f" (and {counted(len(missing) - 1, 'other')}{of})" if len(missing) > 1 else ""
        raise UserError(f"{file} names {missing[0]}{more}, which {folder} lacks")


def _fault(box: Any, height: int, width: int) -> str | None:
    """What is wrong with a box, or None."""
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, int | float) and math.isfinite(x) for x in box)
    ):
        return f"its bbox is {box}, not x, y, width, height"
    x, y, w, h = box
    if w < 0 or h < 0:
        return f"its box {box} has a negative width or height (a bbox is x, y, width, height)"
    if w == 0 or h == 0:
        return f"its box {box} is empty"
    if x < -MARGIN or y < -MARGIN or x + w > width + MARGIN or y + h > height + MARGIN:
        return (
            f"its box {box} lies outside of the image of {width}x{height} (a bbox is x, y, width, "
            "height in pixels)"
        )
    return None


def _object(
    what: str, annotation: dict[str, Any], number: int, height: int, width: int
) -> dict[str, Any]:
    segmentation = annotation.get("segmentation") or []
    if segmentation:
        try:
            check_segmentation(segmentation, height, width)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
    x, y, w, h = annotation["bbox"]
    return {
        "bbox": [x, y, w, h],
        "area": annotation.get("area", w * h),
        "iscrowd": int(bool(annotation.get("iscrowd", 0))),
        "segmentation": segmentation,
        "class": number,
    }


def _report(file: Path, faulty: list[str], count: int) -> None:
    """Skip a few faulty boxes with a warning. Raise UserError if there are many."""
    if not faulty:
        return
    more = f" (and {counted(len(faulty) - 1, 'other')})" if len(faulty) > 1 else ""
    if len(faulty) > MAX_FAULTY_SHARE * count:
        raise UserError(f"{faulty[0]}{more}: correct or remove it")
    say_once(f"passed over {counted(len(faulty), 'faulty box', 'faulty boxes')}: {faulty[0]}{more}")

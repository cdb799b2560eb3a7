"""Object masks in COCO's formats: polygons and run-length codes, compressed or not."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need

JOB = "masks of objects (COCO)"


def encode_masks(masks: Bool[np.ndarray, "objects height width"]) -> list[dict[str, Any]]:
    """Compressed run-length codes for JSON: {"size": [height, width], "counts": text}."""
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    return [
        {"size": list(code["size"]), "counts": _text(code["counts"])}
        for code in mask_library().encode(columns)
    ]


def decode_masks(
    segmentations: Sequence[Any], height: int, width: int
) -> Bool[np.ndarray, "objects height width"]:
    """Decode the masks of one image's objects. Raises UserError if one is broken."""
    if not segmentations:
        return np.zeros((0, height, width), bool)
    codes = [to_rle(segmentation, height, width) for segmentation in segmentations]
    try:
        return mask_library().decode(codes).transpose(2, 0, 1).astype(bool)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"a run-length code is broken ({one_line(error)})") from None


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Convert a COCO segmentation to a compressed run-length code.

    It may be polygons ([[x0, y0, x1, y1, ...], ...]) or a code whose counts are a list or text.
    Raises UserError for anything else, and for another size.
    """
    check_segmentation(segmentation, height, width)
    library = mask_library()
    if isinstance(segmentation, dict):
        packed = isinstance(segmentation["counts"], str)
        return segmentation if packed else library.frPyObjects(segmentation, height, width)
    return library.merge(library.frPyObjects(segmentation, height, width))


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Raise UserError unless it is polygons, or a run-length code of this size."""
    if isinstance(segmentation, dict):
        _check_code(segmentation, height, width)
    elif not _are_polygons(segmentation):
        raise UserError(
            "a segmentation is neither a run-length code nor polygons of three points or more"
        )


def _check_code(code: dict[str, Any], height: int, width: int) -> None:
    size, counts = code.get("size"), code.get("counts")
    if size != [height, width]:
        raise UserError(
            f"a run-length code is of size {size}, its image of [{height}, {width}] (height, width)"
        )
    if isinstance(counts, str):
        try:
            mask_library().decode({"size": size, "counts": counts})
        except (ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"a run-length code is broken ({one_line(error)})") from None
        return
    counts = counts if isinstance(counts, list) else []
    if not all(type(c) is int and c >= 0 for c in counts) or sum(counts) != height * width:
        raise UserError(f"the counts of a run-length code do not add up to {height * width} pixels")


def _are_polygons(segmentation: Any) -> bool:
    return (
        isinstance(segmentation, list)
        and len(segmentation) > 0
        and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(x, (int, float)) and abs(x) < 1e9 for x in polygon)
            for polygon in segmentation
        )
    )


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def mask_library() -> ModuleType:
    """The mask functions of faster-coco-eval. Raises UserError if it is not installed."""
    return need("faster_coco_eval.core.mask", "dense", JOB)

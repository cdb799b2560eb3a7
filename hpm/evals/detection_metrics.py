"""COCO's average precision of boxes and masks, computed by faster-coco-eval."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpm.core.extras import need
from hpm.data.rle import encode_masks

Kind = Literal["boxes", "masks"]
IOU_TYPES: dict[Kind, str] = {"boxes": "bbox", "masks": "segm"}
# The first of COCO's twelve numbers.
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@dataclass
class Detections:
    """What was found in one image, in the pixels of its file.

    boxes: x0, y0, x1, y1. classes: numbers into the source's `classes`. masks: None of a detector
    of boxes.
    """

    boxes: Float[Tensor, "detections 4"]
    scores: Float[Tensor, " detections"]
    classes: Int[Tensor, " detections"]
    masks: Bool[Tensor, "detections height width"] | None = None


def to_results(index: int, found: Detections) -> list[dict[str, Any]]:
    """The detections of an image, by its index in the source, as COCO's JSON of results."""
    corners = found.boxes.double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    codes: Sequence[Any] = [None] * len(boxes)
    if found.masks is not None:
        codes = encode_masks(found.masks.cpu().numpy())
    rows = zip(found.classes.tolist(), found.scores.tolist(), boxes, codes, strict=True)
    return [
        {"image_id": index, "category_id": number, "score": score, "bbox": box}
        | ({} if code is None else {"segmentation": code})
        for number, score, box, code in rows
    ]


def average_precision(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Kind = "boxes"
) -> dict[str, float]:
    """AP (mean over IoU 0.50 to 0.95), AP50, AP75, AP_small, AP_medium and AP_large, in percent, of
    at most 100 detections per image; without those of sizes that no object has.

    Args:
        truth: COCO's JSON, as `hpm.data.detection.ground_truth` gives it.
        results: of all its images, as `to_results` gives them.
        kind: by the overlap of boxes, or of masks.
    """
    library = need("faster_coco_eval", "dense", "average precision")
    known = library.COCO(copy.deepcopy(truth))
    # With a box beside its mask, a result's size would be the box's.
    left_out = "bbox" if kind == "masks" else "segmentation"
    rows = [{k: v for k, v in result.items() if k != left_out} for result in results]
    evaluation = library.COCOeval_faster(known, known.loadRes(rows), IOU_TYPES[kind])
    evaluation.run()
    numbers = np.asarray(evaluation.stats[: len(MEASURES)], float).tolist()
    return {name: 100 * x for name, x in zip(MEASURES, numbers, strict=True) if x >= 0}

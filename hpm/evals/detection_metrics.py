"""COCO's average precision of boxes and masks, computed by faster-coco-eval."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from hpm.core.extras import need

Kind = Literal["boxes", "masks"]
IOU_TYPES: dict[Kind, str] = {"boxes": "bbox", "masks": "segm"}
# The first of COCO's twelve numbers.
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def average_precision(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Kind = "boxes"
) -> dict[str, float]:
    """AP (mean over IoU 0.50 to 0.95), AP50, AP75, AP_small, AP_medium and AP_large, in percent, of
    at most 100 detections per image; without those of sizes that no object has.

    Args:
        truth: COCO's JSON, as `hpm.data.detection.ground_truth` gives it.
        results: of all its images, as `hpm.data.detection.to_results` gives them.
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

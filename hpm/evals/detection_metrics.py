"""COCO's average precision of boxes and masks, computed by faster-coco-eval, with bootstrap
intervals over images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from hpm.core.extras import need
from hpm.evals.bootstrap import centred, drawn_images, in_percent

Kind = Literal["boxes", "masks"]
IOU_TYPES: dict[Kind, str] = {"boxes": "bbox", "masks": "segm"}
# The first of COCO's twelve numbers.
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
WITH_INTERVAL = ("AP", "AP50", "AP75")
RESAMPLES = 1000
MATCHES_AT_ONCE = 100_000  # of a resample, category and image
MAX_DETECTIONS = 100  # per image and category, as COCO's numbers have it


@dataclass(frozen=True)
class EvaluatedDetections:
    """Detections, matched to the objects of their images once: a resample of the images only
    accumulates these matches anew.

    values: the measures, in percent, without those of sizes that no object has.
    truth: COCO's JSON of the images.
    matches: the library's matches of each category and image, at all IoU thresholds.
    parameters: the library's, of objects of all sizes.
    """

    values: dict[str, float]
    truth: dict[str, Any]
    matches: np.ndarray  # [categories images], of the library's type
    parameters: Any
    _resampled: dict[int, np.ndarray] = field(default_factory=dict)

    def numbers(self, seed: int = 0) -> dict[str, float]:
        """The measures; AP, AP50 and AP75 with the ends of their 95 % bootstrap intervals over
        images (`AP_low`, `AP_high`)."""
        return self.values | _with_ends(self.values, self.resampled(seed), 0, 1)

    def difference(self, other: EvaluatedDetections, seed: int = 0) -> dict[str, float]:
        """The measures less those of the other, in points, with their intervals.

        Both on the same images, which are resampled in pairs: much narrower than from two
        intervals. Raises ValueError where the images differ.
        """
        if self.truth != other.truth:
            raise ValueError("the two were not measured on the same images")
        values = {name: x - other.values[name] for name, x in self.values.items()}
        return values | _with_ends(values, self.resampled(seed) - other.resampled(seed), -1, 1)

    def resampled(self, seed: int) -> Float[np.ndarray, "measures resamples"]:
        """AP, AP50 and AP75 of resamples of the images, as fractions; the same images for the same
        seed. NaN where a resample has no objects."""
        if seed not in self._resampled:
            draws = drawn_images(self.matches.shape[1], seed, RESAMPLES)
            self._resampled[seed] = np.concatenate([self.of_resamples(each) for each in draws], 1)
        return self._resampled[seed]

    def of_resamples(
        self, counts: Int[np.ndarray, "resamples images"]
    ) -> Float[np.ndarray, "measures resamples"]:
        """AP, AP50 and AP75 as fractions, each image counted so many times; as many images in every
        resample as there are."""
        at_once = max(1, MATCHES_AT_ONCE // self.matches.size)
        parts = [counts[first : first + at_once] for first in range(0, len(counts), at_once)]
        return np.concatenate([self._accumulated(part) for part in parts], 1)

    def _accumulated(
        self, counts: Int[np.ndarray, "resamples images"]
    ) -> Float[np.ndarray, "measures resamples"]:
        """The same by one call of the library, which starts threads in each: a category of a
        resample is a category of its own to it."""
        # The library sorts stably by score, and copies of an image stay together: detections of
        # equal score keep their order.
        ids = np.arange(counts.shape[1])
        chosen = [self.matches[:, np.repeat(ids, each)] for each in counts]
        parameters = copy.copy(self.parameters)
        parameters.catIds = list(range(len(counts) * len(self.matches)))
        found = _library().faster_eval_api_cpp.COCOevalAccumulate(
            parameters, np.concatenate(chosen).ravel().tolist()
        )
        precision = found["precision"][..., 0, 0].mean(1)  # over recalls: [thresholds categories]
        precision = precision.reshape(len(precision), len(counts), -1)
        known = precision[0] >= 0  # categories with objects
        total, number = np.where(known, precision, 0).sum(2), known.sum(1)
        ap = np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
        at = [int(np.isclose(parameters.iouThrs, iou).argmax()) for iou in (0.5, 0.75)]
        return np.stack([ap.mean(0), *ap[at]])


def evaluate_detections(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Kind = "boxes"
) -> EvaluatedDetections:
    """AP (mean over IoU 0.50 to 0.95), AP50, AP75, AP_small, AP_medium and AP_large, of at most 100
    detections per image.

    Args:
        truth: COCO's JSON, as `hpm.data.detection.ground_truth` gives it.
        results: of all its images, as `hpm.data.detection.to_results` gives them.
        kind: by the overlap of boxes, or of masks.
    """
    library = _library()
    known = library.COCO(copy.deepcopy(truth))
    # With a box beside its mask, a result's size would be the box's.
    left_out = "bbox" if kind == "masks" else "segmentation"
    rows = [{k: v for k, v in result.items() if k != left_out} for result in results]
    evaluation = library.COCOeval_faster(known, known.loadRes(rows), IOU_TYPES[kind])
    evaluation.run()
    numbers = np.asarray(evaluation.stats[: len(MEASURES)], float).tolist()
    values = {name: 100 * x for name, x in zip(MEASURES, numbers, strict=True) if x >= 0}
    parameters = copy.deepcopy(evaluation.params)
    parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]
    parameters.maxDets = [MAX_DETECTIONS]
    return EvaluatedDetections(values, truth, _matches(evaluation, parameters), parameters)


def _matches(evaluation: Any, parameters: Any) -> np.ndarray:
    """The library's matches [categories images], from the overlaps that it has computed."""
    images, categories = parameters.imgIds, parameters.catIds
    overlaps = [[evaluation.ious[image, n] for n in categories] for image in images]
    found = _library().faster_eval_api_cpp.COCOevalEvaluateImages(
        parameters.areaRng,
        MAX_DETECTIONS,
        parameters.iouThrs,
        overlaps,
        evaluation.gt_dataset,
        evaluation.dt_dataset,
        images,
        categories,
        True,  # detections are compared with objects of their category
    )
    table = np.empty(len(found), object)
    table[:] = found
    return table.reshape(len(categories), len(images))


def _with_ends(
    values: dict[str, float],
    resampled: Float[np.ndarray, "measures resamples"],
    lowest: float,
    highest: float,
) -> dict[str, float]:
    """The values (in percent) that have intervals, with the ends of these.

    Fewer distinct objects have a higher AP, because precision is the highest at any greater recall.
    So resamples lie too high: with three objects of a category, by more than the interval's width.
    They are centred on the value. (Of 100 simulated test sets of 60 images and 20 categories, the
    interval held the expected AP in 95, percentiles as they are in 79.)
    """
    known = [name for name in WITH_INTERVAL if name in values]
    if not known:
        return {}
    points = np.array([values[name] / 100 for name in known])
    return in_percent(known, points, centred(resampled, points, lowest, highest))


def _library() -> Any:
    return need("faster_coco_eval", "dense", "average precision")

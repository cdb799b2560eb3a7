"""What a detector finds in the test images, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.data.dense import dense_batches
from hpm.data.detection import ground_truth, image_size, to_results
from hpm.data.joint import DetectionTesting
from hpm.data.sources import Source
from hpm.evals.contract import Numbers
from hpm.evals.detect import Options
from hpm.evals.detection_metrics import EvaluatedDetections, Kind, evaluate_detections
from hpm.evals.task import Task
from hpm.training.loop import autocast
from hpm.weights.detection import DetectionModel

BATCH_SIZE = 8


@dataclass(frozen=True)
class Found:
    """COCO's JSON of all readable test images, and of what was found in them."""

    truth: dict[str, Any]
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class DetectionScores:
    """Average precision, by the overlap of boxes or of masks."""

    found: Found
    kind: Kind

    def numbers(self, seed: int) -> Numbers:
        return self._evaluated.numbers(seed)

    def difference(self, other: DetectionScores, seed: int) -> Numbers:
        return self._evaluated.difference(other._evaluated, seed)

    @cached_property
    def _evaluated(self) -> EvaluatedDetections:
        return evaluate_detections(self.found.truth, self.found.results, self.kind)


def check_images(source: Source, channels: int, task: Task) -> None:
    """Read all test images and their annotations once: UserError where they do not fit each other,
    or too many are unreadable. Training takes so much longer that this is known before."""
    unreadable = task.unreadable(source)
    views = DetectionTesting(channels, source.is_deep(), size=None)
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = dense_batches(source, views, BATCH_SIZE, task.workers, rank, world_size)
    for batch in track(batches, "checking", -(-len(source) // (BATCH_SIZE * world_size))):
        unreadable.add(batch.unreadable)
    unreadable.check(lambda line: None)  # said when they are tested


def find_objects(model: DetectionModel, source: Source, options: Options, task: Task) -> Found:
    """Detect the objects of all readable images of a source. Several processes share the images;
    all of them get the whole result. UserError where too many images are unreadable."""
    unreadable = task.unreadable(source)
    side, device = model.image_size, model.mean.device
    views = DetectionTesting(model.channels, source.is_deep(), size=side, longest=side)
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = dense_batches(source, views, BATCH_SIZE, task.workers, rank, world_size)
    read: list[int] = []
    results: list[dict[str, Any]] = []
    for batch in track(batches, "testing", -(-len(source) // (BATCH_SIZE * world_size))):
        unreadable.add(batch.unreadable)
        indices = batch.indices.tolist()
        sizes = [image_size(source, index) for index in indices]
        if indices:
            with autocast(device, options.precision):
                found = model.detect(batch.images, sizes)
            for index, each in zip(indices, found, strict=True):
                results += to_results(index, each)
        read += indices
    unreadable.check(task.reader.report)
    everyones = sorted(index for part in distributed.gather(read) for index in part)
    if not everyones:
        raise UserError(f"{source.name}: no readable image")
    rows = [row for part in distributed.gather(results) for row in part]
    rows.sort(key=lambda row: row["image_id"])
    return Found(ground_truth(source, everyones), rows)

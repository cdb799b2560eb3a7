"""Test a trained segmenter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.data.dense import dense_batches
from hpm.data.joint import SegmentationTesting
from hpm.data.sources import Source
from hpm.evals.contract import Numbers
from hpm.evals.segmentation_metrics import (
    PixelCounts,
    confusion_matrices,
    count_pixels,
    iou_per_class,
    segmentation_difference,
    segmentation_scores,
)
from hpm.evals.task import Task
from hpm.training.loop import autocast
from hpm.weights.segmentation import SegmentationModel


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a segmentation, computed from the pixel counts of each test image."""

    counts: PixelCounts
    classes: list[str]

    def numbers(self, seed: int) -> Numbers:
        return segmentation_scores(self.counts, seed)

    def difference(self, other: Any, seed: int) -> Numbers:
        return segmentation_difference(self.counts, other.counts, seed)

    def per_class(self) -> dict[str, Numbers]:
        """IoU of each class in percent; classes that never occur are left out."""
        return {
            name: {"iou": iou} for name, iou in iou_per_class(self.counts, self.classes).items()
        }


def test_model(
    model: SegmentationModel,
    source: Source,
    views: SegmentationTesting,
    task: Task,
    precision: str,
) -> PixelCounts:
    """Pixel counts of all readable test images, in order, at the size of their files. Several
    processes share the images, and all of them return the counts of all."""
    unreadable = task.unreadable(source)
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = dense_batches(source, views, 1, task.workers, rank, world_size)
    count = len(distributed.part_of(len(source)))
    ids, found = [torch.empty(0, dtype=torch.int64)], [_no_counts(len(model.classes))]
    for batch in track(batches, "testing", total=count):
        unreadable.add(batch.unreadable)
        for image, labels in zip(batch.images, batch.targets, strict=True):
            with autocast(task.device, precision):
                predicted = model.labels(image, tuple(labels.shape)).cpu()
            matrix = confusion_matrices(predicted[None], labels[None], len(model.classes))
            counts = count_pixels(matrix)
            rows = (counts.hits, counts.truth, counts.predicted)
            found.append(torch.stack([torch.from_numpy(row) for row in rows], 1))
        ids.append(batch.indices)
    unreadable.check(task.reader.report)
    everyones = distributed.rows_of_all(torch.cat(ids))
    if not len(everyones):
        raise UserError(f"{source.name}: no readable image")
    rows_in_order = distributed.rows_of_all(torch.cat(found))[everyones.argsort()].numpy()
    return PixelCounts(*(rows_in_order[:, i] for i in range(3)))


def _no_counts(classes: int) -> Tensor:
    return torch.empty(0, 3, classes, dtype=torch.int64)

"""Write the classes that a classifier gives to the images, or videos, of a folder as CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch

from hpm.commands.options import PredictConfig
from hpm.core.errors import UserError
from hpm.core.files import new_file, write_text
from hpm.data.sources import FileSource
from hpm.data.video.sampling import ViewGrid
from hpm.data.video.sources import VideoFiles
from hpm.evals.features import ImageReader
from hpm.evals.metrics import mean_scores
from hpm.weights.classification import ClassificationModel

FILE = "predictions.csv"
BATCH_SIZE = 32  # images, or views of videos, per forward pass


@torch.inference_mode()
def write_classes(
    model: ClassificationModel,
    source: FileSource | VideoFiles,
    out: Path,
    config: PredictConfig,
    report: Callable[[str], None],
) -> Path:
    """Write a row for each readable file: its path, the class of highest probability, and the
    probability of each class, the mean over the views."""
    file, sampling = new_file(out, FILE), model.sampling(config.frame_stride)
    grid = ViewGrid(config.segments, config.crops)
    _check_views(model, config)
    reader = ImageReader(
        max(1, BATCH_SIZE // grid.count),
        config.workers,
        report,
        config.crop_share,
        config.max_unreadable,
        sampling,
        grid,
    )
    height, width = model.architecture.image_size[-2:]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "class", *model.classes])
    for batch in reader.batches(source, (height, width), model.architecture.channels):
        probabilities = mean_scores(model(model.normalize(batch.images)).softmax(1), grid.count)
        for index, row in zip(batch.indices.tolist(), probabilities.tolist(), strict=True):
            name = os.path.relpath(source.paths[index], source.root)
            best = model.classes[row.index(max(row))]
            table.writerow([name, best, *(f"{value:.6f}" for value in row)])
    write_text(file, text.getvalue())
    return file


def _check_views(model: ClassificationModel, config: PredictConfig) -> None:
    """Raise UserError for options of clips and a classifier of images, or for views that cannot
    be."""
    several = config.segments * config.crops > 1
    if model.sampling() is None and (several or config.frame_stride is not None):
        raise UserError(
            f"{config.model} is of images: leave --segments, --crops and --frame-stride out"
        )
    if config.crops > 1 and config.crop_share != 1:
        raise UserError("several --crops keep the shorter side whole: leave --crop-share out")

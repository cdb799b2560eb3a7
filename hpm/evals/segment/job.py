"""A segmentation evaluation: its data and sizes, and the test of each trained model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.data.joint import SegmentationTesting, SegmentationTraining
from hpm.data.segmentation import open_segmentation
from hpm.data.sources import Source, Subset
from hpm.evals.contract import TRAINED, Measured
from hpm.evals.features import EvaluatedBackbone
from hpm.evals.files import training_folder
from hpm.evals.segment import Options
from hpm.evals.segment.figure import draw_predictions
from hpm.evals.segment.testing import SegmentationScores, test_model
from hpm.evals.task import Task
from hpm.models.build import check_image_size
from hpm.models.encoder import Encoder
from hpm.weights.segmentation import SegmentationModel

STEPS = {"linear": 1000, "upernet": 2000}
SHARE_HELD_OUT = 5  # one in five images


class SegmentationJob:
    """What both heads need: resolved options, images and views.

    image_size: side in pixels of crops and windows. classes: names. train, test: images.
    """

    def __init__(self, task: Task, options: Options):
        self.task, self.options = task, options
        encoder: Encoder = task.backbones[0].backbone.encoder
        self.image_size = options.image_size or default_size(encoder)
        for each in task.backbones:
            check_image_size((self.image_size,) * 2, each.backbone.encoder.patch_size)
        self.stride = options.stride or max(1, round(self.image_size * 2 / 3))
        if self.stride > self.image_size:
            raise UserError(
                f"stride is {self.stride}; above image_size {self.image_size} it leaves gaps "
                "between windows"
            )
        self.steps = options.steps or STEPS[options.head]
        self.train, self.test = self._splits()
        self.classes = self.train.classes
        about: dict[str, Any] = {
            "classes": len(self.classes),
            "image_size": self.image_size,
            "stride": self.stride,
            "steps": self.steps,
            "train_images": len(self.train),
        }
        task.about |= about

    def folder(self, backbone: str) -> Path:
        """The folder of a backbone's model. Its name does not depend on options of the test."""
        if self.task.folder is None:
            raise UserError(f"{self.options.run} is no run folder: pass --out FOLDER for the model")
        return training_folder("segment", self.options, self.task.folder, backbone)

    def training_views(self, backbone: EvaluatedBackbone, source: Source) -> SegmentationTraining:
        """Random crops, padded with the mean colour."""
        options = self.options
        return SegmentationTraining(
            backbone.backbone.encoder.channels,
            source.is_deep(),
            size=(self.image_size, self.image_size),
            seed=options.seed,
            scale=options.scale,
            flip=options.flip,
            distort=options.distort,
            fill=(255 * backbone.backbone.mean).tolist(),
        )

    def testing_views(self, backbone: EvaluatedBackbone, source: Source) -> SegmentationTesting:
        """Whole images."""
        channels = backbone.backbone.encoder.channels
        return SegmentationTesting(channels, source.is_deep(), size=self.image_size)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Ids of the training images (a fifth) that are held out to choose hyper-parameters on."""
        return _fifth(self.train, self.options.seed)

    def _splits(self) -> tuple[Source, Source]:
        """(training images, test images)."""
        options = self.options
        splits = open_segmentation(options.data, options.ignored, options.one_class)
        train, test = splits.train, splits.test
        if options.test:
            others = open_segmentation(options.test, options.ignored, options.one_class)
            test = others.test_or_all
            if test.classes != train.classes:
                raise UserError(
                    f"{options.test} has other classes than {options.data}: give both the same "
                    "classes.txt"
                )
        if test is None:
            held = _fifth(train, options.seed)
            test = Subset(train, held)
            train = Subset(train, np.setdiff1d(np.arange(len(train)), held))
        if options.train_share < 1:
            rng = np.random.default_rng([options.seed, len(train), 1])
            count = max(1, round(options.train_share * len(train)))
            train = Subset(train, np.sort(rng.permutation(len(train))[:count]))
        return train, test

    def measured(self, name: str, model: SegmentationModel, chosen: dict[str, float]) -> Measured:
        """Test the model of a backbone, and save it beside the numbers."""
        if self.task.folder is not None:
            file = self.folder(name) / "segmenter.safetensors"
            distributed.main_first(lambda: model.save(file))
        backbone = next(each for each in self.task.backbones if each.name == name)
        views = self.testing_views(backbone, self.test)
        counts = test_model(model, self.test, views, self.task, self.options.precision)
        self.task.about.setdefault("test_images", len(counts.hits))
        scores = SegmentationScores(counts, self.classes)
        figures: dict[str, Callable[[Path], Any]] = {}
        if name == TRAINED and self.options.figure_images and distributed.is_main():
            ids = np.linspace(0, len(self.test) - 1, self.options.figure_images).astype(int)
            drawn = draw_predictions(model, self.test, views, np.unique(ids).tolist())
            figures = {"images.png": drawn}
        return Measured(
            name, scores=scores, per_class=scores.per_class(), chosen=chosen, figures=figures
        )


def default_size(encoder: Encoder) -> int:
    """Twice the image size of pre-training, rounded to a multiple of the patch size."""
    patch = lcm(*encoder.patch_size)
    return max(1, round(2 * max(encoder.image_size) / patch)) * patch


def _fifth(source: Source, seed: int) -> np.ndarray:
    if len(source) < 2:
        raise UserError(f"{source.name}: one image only, and a part of them has to be held out")
    rng = np.random.default_rng([seed, len(source)])
    return np.sort(rng.permutation(len(source))[: max(1, len(source) // SHARE_HELD_OUT)])

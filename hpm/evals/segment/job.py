"""One segmentation evaluation: its data and sizes, and a trained and tested model per backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core import distributed
from hpm.core.errors import UserError, counted
from hpm.data.joint import SegmentationTesting, SegmentationTraining
from hpm.data.segmentation import open_segmentation
from hpm.data.sources import Source, Splits, Subset
from hpm.evals.contract import RANDOM, TRAINED, Measured
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
SHARE_HELD_OUT = 5  # one in so many images


class SegmentationJob:
    """What both heads need: options with their defaults filled in, images, views.

    image_size: side in pixels of crops and windows. classes: names. train, test: their images.
    """

    def __init__(self, task: Task, options: Options):
        self.task, self.options = task, options
        if options.crop_share != 1:
            raise UserError("segment reads whole images: leave --crop-share out")
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
        splits = self._splits()
        self.train, self.test = splits.train, splits.test
        self.classes = self.train.classes
        about: dict[str, Any] = {
            "classes": len(self.classes),
            "image_size": self.image_size,
            "stride": self.stride,
            "steps": self.steps,
            "train_images": len(self.train),
        }
        task.about |= about

    def rows(self) -> Iterator[Measured]:
        """A row for each backbone."""
        if self.options.head == "linear":
            from hpm.evals.segment.linear import train_linear_heads

            for backbone, (model, chosen) in train_linear_heads(self).items():
                distributed.main_first(lambda m=model, b=backbone: self._save(m, b))  # type: ignore[misc]
                yield self._measured(backbone, model, chosen)
        else:
            from hpm.evals.segment.upernet import train_upernet

            for each in self.task.backbones:
                random = each.name == RANDOM
                weights = None if random else each.backbone.encoder.state_dict()
                model = train_upernet(self, each, weights, self.folder(each.name))
                distributed.main_first(lambda m=model, b=each.name: self._save(m, b))  # type: ignore[misc]
                yield self._measured(each.name, model, {})

    def folder(self, backbone: str) -> Path:
        """Where the model of one backbone is kept; how it is tested has no part in its name."""
        if self.task.folder is None:
            raise UserError(f"{self.options.run} is no run folder: pass --out FOLDER for the model")
        defaults = Options(self.options.run, self.options.data)
        names = ("stride", "figure_images", "baselines")
        same = {name: getattr(defaults, name) for name in names}
        options = dataclasses.replace(self.options, **same)
        return training_folder("segment", options, self.task.folder) / backbone.replace(" ", "_")

    def training_views(self, backbone: EvaluatedBackbone, source: Source) -> SegmentationTraining:
        """Random crops; what an image lacks is filled with the mean colour."""
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

    def images_per_step(self, share: int) -> int:
        """Crops per step over all processes: a multiple of `share`, at most the training images."""
        most = min(self.options.batch_size, len(self.train))
        if most < share:
            world_size = distributed.world_size()
            raise UserError(
                f"{counted(most, 'image')} cannot be a batch of "
                f"{counted(world_size, 'process', 'processes')} and accumulate "
                f"{self.options.accumulate}: {share} or more can"
            )
        return most // share * share

    @cached_property
    def held_out(self) -> np.ndarray:
        """Ids of the training images that choose hyper-parameters: a fifth."""
        return _fifth(self.train, self.options.seed)

    def _splits(self) -> Splits:
        options = self.options
        if options.test == "demo" or options.data == "demo":
            pass  # opened by name
        splits = open_segmentation(options.data, options.ignored, options.one_class)
        train, test = splits.train, splits.test
        if options.test:
            test = open_segmentation(options.test, options.ignored, options.one_class).train
            if test.classes != train.classes:
                raise UserError(
                    f"{options.test} has {counted(len(test.classes), 'class', 'classes')}, not the "
                    f"{len(train.classes)} of {options.data}, in the same order: give both the "
                    "same classes.txt"
                )
        if test is None:
            held = _fifth(train, options.seed)
            test = Subset(train, held)
            train = Subset(train, np.setdiff1d(np.arange(len(train)), held))
        if options.train_share < 1:
            rng = np.random.default_rng([options.seed, len(train), 1])
            count = max(1, round(options.train_share * len(train)))
            train = Subset(train, np.sort(rng.permutation(len(train))[:count]))
        return Splits(train, test)

    def _save(self, model: SegmentationModel, backbone: str) -> None:
        if self.task.folder is not None:
            model.save(self.folder(backbone) / "segmenter.safetensors")

    def _measured(
        self, backbone: str, model: SegmentationModel, chosen: dict[str, float]
    ) -> Measured:
        assert self.test is not None
        of = next(each for each in self.task.backbones if each.name == backbone)
        views = self.testing_views(of, self.test)
        counts = test_model(model, self.test, views, self.task, self.options.precision)
        self.task.about.setdefault("test_images", len(counts.hits))
        scores = SegmentationScores(counts, self.classes)
        figures = {}
        if backbone == TRAINED and self.options.figure_images and distributed.is_main():
            ids = np.linspace(0, len(self.test) - 1, self.options.figure_images)
            picture = draw_predictions(
                model, self.test, views, np.unique(ids.astype(int)).tolist()
            )
            figures = {"images.png": picture}
        per_class = scores.per_class()
        return Measured(
            backbone, scores=scores, per_class=per_class, chosen=chosen, figures=figures
        )


def default_size(encoder: Encoder) -> int:
    """Twice the pre-training's size, as a multiple of the patches'."""
    patch = lcm(*encoder.patch_size)
    return max(1, round(2 * max(encoder.image_size) / patch)) * patch


def _fifth(source: Source, seed: int) -> np.ndarray:
    if len(source) < 2:
        raise UserError(f"{source.name}: one image only, and a part of them has to be held out")
    rng = np.random.default_rng([seed, len(source)])
    return np.sort(rng.permutation(len(source))[: max(1, len(source) // SHARE_HELD_OUT)])

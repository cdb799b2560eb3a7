"""The backbones, images and device of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.data.sources import Source, Splits, Subset, open_source
from hpm.data.unreadable import UnreadableImages
from hpm.data.workers import num_workers
from hpm.evals.contract import COMPARED, RANDOM, TRAINED
from hpm.evals.features import (
    EvaluatedBackbone,
    Features,
    ImageReader,
    Labelled,
    labelled_splits,
    pooled_features,
    split_by_class,
)
from hpm.evals.options import EvalOptions
from hpm.evals.probing import Cached, Probed, Recipe, probe
from hpm.models.build import build_encoder
from hpm.weights.resolve import Backbone, Trained, load

Side = tuple[Source, np.ndarray, ImageReader]


class Task:
    """The inputs of an evaluation, built from its options.

    options: of the evaluation.
    device: device to compute on.
    reader: reads images in batches. test_reader: the same for test images, of which it may read
        several views each.
    trained: the evaluated run, with its decoders and teacher if it has them.
    backbones: of the evaluated run, of the run that --compare names, and random weights.
    folder: folder for results and trained models, or None.
    about: facts for the result, such as `test_images` (of clips, the number of videos), and
        `of_clips` if these are read; evaluations add to it.
    """

    def __init__(
        self, options: EvalOptions, device: torch.device, report: Callable[[str], None]
    ) -> None:
        self.options, self.device = options, device
        self.about: dict[str, Any] = {}
        self.trained = load(options.run)
        self.reader = ImageReader(
            options.batch_size,
            options.workers,
            report,
            options.crop_share,
            options.unreadable_limit,
            self.trained.sampling(options.frames, options.frame_stride),
        )
        self.test_reader = replace(self.reader, grid=options.test_grid)
        self._check_views()
        if self.reader.sampling is not None:
            self.about["of_clips"] = True
        self.backbones = [self._backbone(TRAINED, self.trained)]
        if options.compare:
            self.backbones.append(self._backbone(COMPARED, load(options.compare)))
        if options.with_random_weights:
            self.backbones.append(self._random_backbone())
        for each in self.backbones:
            each.backbone.to(device).eval()
        run_folder = self.trained.folder
        self.folder = Path(options.out) if options.out else run_folder and run_folder / "evals"

    @cached_property
    def splits(self) -> Splits:
        """The images to learn from, and those to test on (None where they are not apart)."""
        clips = self.reader.sampling is not None
        splits = open_source(self.options.data, clips=clips)
        if self.options.test:
            return Splits(splits.train, open_source(self.options.test, clips=clips).test_or_all)
        return splits

    def need_images(self, protocol: str) -> None:
        """Raise UserError for an evaluation on clips."""
        self.trained.need_images(protocol)
        if self.reader.sampling is not None:
            raise UserError(f"{protocol} is for images: leave --frames out")

    def _check_views(self) -> None:
        """Raise UserError if several views are asked for that there cannot be."""
        grid, options = self.test_reader.grid, self.options
        if grid.count > 1 and self.reader.sampling is None:
            raise UserError(
                f"segments is {grid.segments} and crops {grid.crops}, but {options.run} is of "
                "images: several views are of clips (see --frames)"
            )
        if grid.crops > 1 and options.crop_share != 1:
            raise UserError(
                f"crops is {grid.crops} and crop_share {options.crop_share:g}: several crops keep "
                "the shorter side whole; leave crop_share out"
            )

    def _backbone(self, name: str, trained: Trained) -> EvaluatedBackbone:
        size, sampling = trained.architecture.image_size, self.reader.sampling
        if len(size) == 3 and (sampling is None or sampling.frames != size[0]):
            raise UserError(
                f"{trained.name} is of clips of {size[0]} frames, unlike {self.options.run}: they "
                "cannot be compared"
            )
        stride, asked = trained.frame_stride, self.options.frame_stride
        if sampling and len(size) == 3 and asked is None and stride not in (None, sampling.stride):
            self.reader.report(
                f"{trained.name} was trained with a frame stride of {stride}, and is compared at "
                f"that of {self.options.run}, {sampling.stride}"
            )
        backbone = trained.backbone(teacher=self.options.teacher)
        for note in trained.notes:
            self.reader.report(note)
        precision = self.options.feature_precision
        return EvaluatedBackbone(name, backbone, trained.architecture, precision)

    def _random_backbone(self) -> EvaluatedBackbone:
        architecture = self.trained.architecture
        encoder = build_encoder(architecture, self.options.seed)
        backbone = Backbone(encoder, self.trained.mean, self.trained.std)
        return EvaluatedBackbone(RANDOM, backbone, architecture, self.options.feature_precision)

    def labelled(self, train_share: float = 1.0) -> Labelled:
        """Training images (a share of each class) and test images, with labels."""
        data = labelled_splits(self.splits, self.options.seed, train_share)
        self.about["classes"] = len(data.classes)
        return data

    def held_out(self, data: Labelled, labels: np.ndarray | None = None) -> np.ndarray:
        """Ids of the training images on which hyper-parameters are chosen: a fifth of each class.

        labels: those of the readable training images, if known. Default: of all training images.
        """
        labels = data.train_labels if labels is None else labels
        return split_by_class(labels, data.classes, data.train.name, self.options.seed)[1]

    def some_images(self, count: int) -> Source:
        """At most `count` random images of the test split, if there is one, or of all."""
        source = self.splits.test_or_all
        if len(source) <= count:
            return source
        rng = np.random.default_rng([self.options.seed, len(source)])
        return Subset(source, np.sort(rng.permutation(len(source))[:count]))

    def unreadable(self, source: Source) -> UnreadableImages:
        """Count the source's unreadable images; too many are an error."""
        return UnreadableImages(source, self.reader.max_unreadable)

    @property
    def workers(self) -> int:
        """Number of processes that load images."""
        return num_workers(self.options.workers)

    def pooled(self, data: Labelled) -> tuple[dict[str, Features], dict[str, Features]]:
        """Pooled features by name, of the training and of the test images.

        Only the main process returns them; the others return empty dictionaries.
        """
        train, test = (
            pooled_features(self.backbones, *side, self.options.baselines)
            for side in self.sides(data)
        )
        return train, test

    def sides(self, data: Labelled) -> tuple[Side, Side]:
        """Training and test images, each with their labels and what reads them."""
        return (
            (data.train, data.train_labels, self.reader),
            (data.test, data.test_labels, self.test_reader),
        )

    def count_images(self, train: dict[str, Features], test: dict[str, Features]) -> None:
        """Add the numbers of training and test images to `about`."""

        def count() -> dict[str, int]:
            return {
                "train_images": len(next(iter(train.values())).labels),
                "test_images": len(next(iter(test.values())).labels),
            }

        self.about |= distributed.main_first(count)

    def probe_cached(
        self,
        data: Labelled,
        train: dict[str, Features],
        test: dict[str, Features],
        recipe: Recipe,
    ) -> dict[str, Probed]:
        """Probe precomputed features, in the main process."""
        self.count_images(train, test)

        def probe_them() -> dict[str, Probed]:
            bank = Cached(train)
            held = self.held_out(data, bank.labels.numpy())
            return probe(bank, bank, Cached(test), held, len(data.classes), recipe)

        return distributed.main_first(probe_them)

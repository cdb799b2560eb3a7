"""Fine-tune a detector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.durations import check_duration
from hpm.core.errors import UserError, counted
from hpm.core.random_state import random_state_kept
from hpm.data.dense import DenseBatch, dense_loader
from hpm.data.joint import DetectionTraining
from hpm.data.loader import StepSampler
from hpm.data.workers import num_workers
from hpm.evals.detect import Options
from hpm.evals.detect.data import DetectionData
from hpm.evals.features import EvaluatedBackbone
from hpm.models.architecture import Architecture
from hpm.models.build import resized_encoder
from hpm.models.pyramid import STRIDES
from hpm.models.seeds import part_seed, seeded
from hpm.training.loop import StepResult, accumulated, optimizer_step
from hpm.training.optim import step_learning_rate
from hpm.training.supervised import SupervisedTraining, full_batch
from hpm.weights.detection import DetectionModel, DetectorShape


def check_options(options: Options) -> None:
    """Raise UserError for the first invalid option."""
    for text in options.milestones:
        check_duration("milestones", text)


def fine_tune(
    options: Options,
    backbone: EvaluatedBackbone,
    random: bool,
    data: DetectionData,
    folder: Path,
) -> DetectionModel:
    """Train a detector from this encoder, or from random weights of its architecture.

    Saves into `folder`, and resumes from there. The detector is written to
    `detector.safetensors` in it.
    """
    with random_state_kept(backbone.backbone.mean.device):
        training = DetectorTraining(options, backbone, random, data, folder)
        with training.completed():
            training.save_detector()
            return training.model.eval()


class DetectorTraining(SupervisedTraining):
    """A fine-tuning of a detector; the arguments are those of `fine_tune`."""

    trained_name = "detector.safetensors"
    against_divergence = "lower --lr, or pass --clip-grad 1"
    model: DetectionModel

    def __init__(
        self,
        options: Options,
        backbone: EvaluatedBackbone,
        random: bool,
        data: DetectionData,
        folder: Path,
    ):
        self.data, self.name = data, backbone.name
        model = build_model(options, backbone, random, data).to(backbone.backbone.mean.device)
        identity = {"classes": data.classes, "masks": data.masks}
        super().__init__(
            options,
            model,
            data.train,
            full_batch(options.batch_size, len(data.train), options.accumulate),
            options.steps,
            options.lr,
            folder,
            identity,
        )

    def summary(self) -> str:
        return (
            f"fine-tuning {self.name} as a detector: {counted(len(self.source), 'image')}, "
            f"{counted(len(self.data.classes), 'class', 'classes')}, "
            f"{'boxes and masks' if self.data.masks else 'boxes'}"
        )

    def train_step(self, batch: DenseBatch, step: int) -> StepResult:
        """One update with the sum of Mask R-CNN's losses."""
        options = self.options
        # torchvision draws proposals, and the encoder drops blocks, by the global generators.
        torch.manual_seed(part_seed(options.seed, f"step {step}, process {distributed.rank()}"))
        losses: list[dict[str, Tensor]] = []
        for part in accumulated(self.parallel, batch.parts(options.accumulate)):
            images = [self.model.normalize(image) for image in part.images]
            targets: Any = part.targets  # of detection, Objects
            objects = [each.to(self.device) for each in targets]
            with self.autocast():
                found = self.parallel(images, objects)
            loss = torch.stack(list(found.values())).sum()
            (loss / options.accumulate).backward()
            losses.append({"loss": loss.detach()} | {n: x.detach() for n, x in found.items()})
        optimizer_step(self.model, self.optimizer, self.learning_rate(step), options.clip_grad)
        means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        return StepResult({"loss": means.pop("loss")}, means)

    def learning_rate(self, step: int) -> float:
        options = self.options
        milestones = [self.duration(text) for text in options.milestones]
        warmup = self.duration(options.warmup)
        return step_learning_rate(step, warmup, options.lr, milestones, options.lr_factor)

    def loader(self, sampler: StepSampler) -> Iterable[DenseBatch]:
        options = self.options
        views = DetectionTraining(
            self.model.channels,
            self.source.is_deep(),
            size=self.model.image_size,
            seed=options.seed,
            scale=options.scale,
            flip=options.flip,
            fill=[255 * value for value in self.model.shape.mean],
        )
        workers, on_gpu = num_workers(options.workers), self.device.type == "cuda"
        return dense_loader(self.source, views, sampler, workers, on_gpu)

    def save_detector(self) -> None:
        """Write the trained detector, again if it exists: the score threshold may have changed."""
        distributed.main_first(lambda: self.model.save(self.trained_file))


def build_model(
    options: Options, backbone: EvaluatedBackbone, random: bool, data: DetectionData
) -> DetectionModel:
    """A detector with the weights of this encoder (or random ones) and new heads, initialised from
    the seed. Raises UserError if the encoder does not fit."""
    side = image_size(options, backbone.architecture)
    weights = None if random else backbone.backbone.encoder.state_dict()
    shape = DetectorShape(
        replace(backbone.architecture.encoder(), image_size=(side, side)),
        list(data.classes),
        backbone.backbone.mean.tolist(),
        backbone.backbone.std.tolist(),
        data.masks,
        options.window_size,
        options.channels,
        options.anchor_scale,
        options.proposals,
        options.score_threshold,
    )
    with seeded(options.seed):
        encoder = resized_encoder(backbone.architecture, weights, (side, side), options.drop_path)
        return DetectionModel(shape, encoder, options.box_batch_size)


def image_size(options: Options, architecture: Architecture) -> int:
    """Side of the crops. Raises UserError if the maps of the pyramid do not fit."""
    multiple = max(STRIDES[-1], *architecture.patch_size)
    wanted = options.image_size or 2 * max(architecture.image_size)
    fitting = max(1, round(wanted / multiple)) * multiple
    if options.image_size not in (None, fitting):
        raise UserError(
            f"image_size {wanted} is not a multiple of {multiple}, the largest stride of the "
            f"feature pyramid: the nearest that fits is {fitting}"
        )
    return fitting

"""The fine-tuning of a detector on the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.durations import check_duration, duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.progress import say
from hpm.core.random_state import random_state_kept
from hpm.core.signals import stop_signals
from hpm.data.dense import DenseBatch, dense_loader
from hpm.data.joint import DetectionTraining
from hpm.data.loader import StepSampler, num_workers
from hpm.data.unreadable import UnreadableImages
from hpm.evals.detect import OF_THE_TEST, Options
from hpm.evals.detect.data import DetectionData
from hpm.evals.features import EvaluatedBackbone
from hpm.models.architecture import Architecture
from hpm.models.build import resized_encoder
from hpm.models.pyramid import STRIDES
from hpm.models.seeds import part_seed, seeded
from hpm.training.folder import TrainingFolder, weights_fingerprint
from hpm.training.log import RunLog
from hpm.training.loop import (
    StepResult,
    accumulated,
    autocast,
    counted_batches,
    every,
    optimizer_step,
    train,
)
from hpm.training.optim import layer_decay_groups, step_learning_rate
from hpm.training.schedule import long_warmup
from hpm.weights.detection import DetectionModel, DetectorShape

LOG_EVERY = 10
# Options that a training may go on with other values of.
FREE = {
    *OF_THE_TEST,
    "run",
    "compare",
    "out",
    "workers",
    "device",
    "checkpoint_every",
    "test",
    "data",
    "teacher",
    "crop_share",
    "max_unreadable",
}


def check_options(options: Options) -> None:
    """Raises UserError for the first option that cannot work."""
    if options.crop_share != 1:
        raise UserError("detection sees whole images: leave --crop-share out")
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

    Saves into `folder`, and goes on from there; the detector is left there as
    `detector.safetensors`.
    """
    with random_state_kept(backbone.backbone.mean.device):
        training = DetectorTraining(options, backbone, random, data, folder)
        try:
            training.resume()
            if training.step < training.total_steps:
                training.train()
            training.save_detector()
            return training.model.eval()
        finally:
            training.files.release()


class DetectorTraining:
    """A fine-tuning at the step where it stands: a `Training` of the loop.

    The arguments are those of `fine_tune`.
    """

    log_every = LOG_EVERY

    def __init__(
        self,
        options: Options,
        backbone: EvaluatedBackbone,
        random: bool,
        data: DetectionData,
        folder: Path,
    ):
        self.options, self.data, self.name = options, data, backbone.name
        self.device = backbone.backbone.mean.device
        self.images_per_step = _images_per_step(options, len(data.train))
        self.steps_per_epoch = len(data.train) // self.images_per_step
        self.total_steps = options.steps
        self.model = build_model(options, backbone, random, data).to(self.device)
        groups = layer_decay_groups(
            self.model, options.lr, options.layer_decay, options.weight_decay
        )
        self.optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)
        self.unreadable = UnreadableImages(data.train, options.max_unreadable)
        self.files = TrainingFolder(folder, "fine-tuning", self._identity())
        self.step = 0

    @property
    def detector_file(self) -> Path:
        """Where the trained detector is written."""
        return self.files.folder / "detector.safetensors"

    def resume(self) -> None:
        """Lock the folder, unless the training is finished, and go on from its checkpoint."""
        finished = distributed.from_main(self.detector_file.exists())
        if not finished and (note := self.files.claim()):
            say(note)
        self.step = self.files.resume(self.model, self.optimizer, self.unreadable)

    def train(self) -> None:
        """All steps that are left."""
        options = self.options
        self.log = RunLog(self.files.folder, self.step, self.total_steps, distributed.is_main())
        self.log.info(
            f"fine-tuning {self.name} as a detector: {counted(len(self.data.train), 'image')}, "
            f"{counted(len(self.data.classes), 'class', 'classes')}, "
            f"{'boxes and masks' if self.data.masks else 'boxes'}, "
            f"{counted(self.total_steps, 'step')} of {self.images_per_step}, from step "
            f"{self.step}, into {self.files.folder}"
        )
        for line in long_warmup(options.warmup, self._steps(options.warmup), self.total_steps):
            self.log.info(line)
        self.parallel = distributed.data_parallel(self.model.train())
        try:
            with stop_signals() as stop:
                train(self, self.train_step, stop)
        finally:
            self.log.close()

    def train_step(self, batch: DenseBatch, step: int) -> StepResult:
        """The sum of Mask R-CNN's losses; one update of all layers."""
        options = self.options
        # torchvision draws proposals, and the encoder drops blocks, by the global generators.
        torch.manual_seed(part_seed(options.seed, f"step {step}, process {distributed.rank()}"))
        losses: list[dict[str, Tensor]] = []
        for part in accumulated(self.parallel, batch.parts(options.accumulate)):
            images = [self.model.normalize(image) for image in part.images]
            targets: Any = part.targets  # of detection, Objects
            objects = [each.to(self.device) for each in targets]
            with autocast(self.device, options.precision):
                found = self.parallel(images, objects)
            loss = torch.stack(list(found.values())).sum()
            (loss / options.accumulate).backward()
            losses.append({"loss": loss.detach()} | {n: x.detach() for n, x in found.items()})
        optimizer_step(self.model, self.optimizer, self.learning_rate(step), options.clip_grad)
        means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        return StepResult({"loss": means.pop("loss")}, means)

    def learning_rate(self, step: int) -> float:
        """Of the top layer, in a 0-based step."""
        options = self.options
        milestones = [self._steps(text) for text in options.milestones]
        warmup = self._steps(options.warmup)
        return step_learning_rate(step, warmup, options.lr, milestones, options.lr_factor)

    def batches(self) -> Iterator[DenseBatch]:
        """This process's part of each batch, from the present step to the last."""
        options, world_size = self.options, distributed.world_size()
        sampler = StepSampler(
            len(self.data.train),
            self.images_per_step,
            self.total_steps,
            options.seed,
            self.step,
            distributed.rank(),
            world_size,
        )
        views = DetectionTraining(
            self.model.channels,
            self.data.train.is_deep(),
            size=self.model.image_size,
            seed=options.seed,
            scale=options.scale,
            flip=options.flip,
            fill=[255 * value for value in self.model.shape.mean],
        )
        loader = dense_loader(
            self.data.train,
            views,
            sampler,
            num_workers(options.workers),
            self.device.type == "cuda",
        )
        return counted_batches(loader, self.unreadable, self.images_per_step // world_size)

    def describe(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
        """The learning rate of the last step, for the log; the loss, for the progress bar."""
        return {"learning_rate": self.learning_rate(self.step - 1)}, f"loss {means['loss']:.4f}"

    def not_finite(self, batch: DenseBatch, result: StepResult) -> UserError:
        return UserError(
            f"the loss is not finite at step {self.step}: lower --lr, or pass --clip-grad 1 or "
            "--precision float32, in another --out"
        )

    def saves(self, steps_done: int) -> bool:
        save_every = max(1, round(self._steps(self.options.checkpoint_every)))
        return every(save_every, self.total_steps)(steps_done)

    def save(self) -> None:
        """Write a checkpoint."""
        self.files.save(self.model, self.optimizer, self.step, self.unreadable)

    def save_detector(self) -> None:
        """Write the trained detector. One that is there is written again where the score threshold
        has another value now."""
        distributed.main_first(lambda: self.model.save(self.detector_file))

    def _steps(self, duration: str) -> float:
        return duration_steps(duration, self.total_steps, self.steps_per_epoch)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a fine-tuning to go on."""
        options = dataclasses.asdict(self.options)
        kept = {name: value for name, value in options.items() if name not in FREE}
        return kept | {
            "images": len(self.data.train),
            "classes": self.data.classes,
            "masks": self.data.masks,
            "images_per_step": self.images_per_step,
            "weights": weights_fingerprint(self.model),
        }


def build_model(
    options: Options, backbone: EvaluatedBackbone, random: bool, data: DetectionData
) -> DetectionModel:
    """A detector with the weights of this encoder (or random ones) and new heads, initialised from
    the seed. UserError where the encoder does not fit."""
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
    """Side of the crops. UserError where the maps of the pyramid would not fit into it."""
    multiple = max(STRIDES[-1], *architecture.patch_size)
    wanted = options.image_size or 2 * max(architecture.image_size)
    fitting = max(1, round(wanted / multiple)) * multiple
    if options.image_size not in (None, fitting):
        raise UserError(
            f"image_size {wanted} is not a multiple of {multiple}, the largest stride of the "
            f"feature pyramid: the nearest that fits is {fitting}"
        )
    return fitting


def _images_per_step(options: Options, num_images: int) -> int:
    """Images per step over all processes, as many in each part of each process."""
    world_size = distributed.world_size()
    share = world_size * options.accumulate
    most = min(options.batch_size, num_images)
    if most < share:
        raise UserError(
            f"{counted(most, 'image')} cannot be a batch of "
            f"{counted(world_size, 'process', 'processes')}, accumulate {options.accumulate}: "
            f"{share} or more can"
        )
    return most // share * share

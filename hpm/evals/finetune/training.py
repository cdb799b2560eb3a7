"""Fine-tuning: the whole encoder trained with labels (the recipe of DeiT and MAE, appendix A.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.config import pair
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.files import write_tensors
from hpm.core.progress import say
from hpm.core.random_state import random_state_kept
from hpm.core.signals import stop_signals
from hpm.data.loader import Batch, StepSampler, normalize, num_workers, training_loader
from hpm.data.unreadable import UnreadableImages
from hpm.evals.features import EvaluatedBackbone, ImageReader, Labelled
from hpm.evals.finetune import Options
from hpm.evals.finetune.augmentation import Augmentation, seed_everything
from hpm.evals.metrics import TrueClassRanks, rank
from hpm.models.architecture import Architecture
from hpm.models.build import build_classifier, check_image_size
from hpm.models.classifier import Classifier
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
from hpm.training.optim import layer_decay_groups, learning_rate
from hpm.training.schedule import long_warmup

LOG_EVERY = 10
# Options that may change when a fine-tuning is resumed, because they do not affect what it learns.
MAY_CHANGE = {
    "run",
    "compare",
    "baselines",
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


def check_finetune(config: Options, architecture: Architecture) -> None:
    """Raise UserError for the first invalid option."""
    size = pair(config.image_size) if config.image_size else architecture.image_size
    check_image_size(size, architecture.patch_size)
    if config.rand_augment != "none" and architecture.channels not in (1, 3):
        raise UserError(
            f"rand_augment knows grey and RGB, but this backbone has "
            f"{counted(architecture.channels, 'channel')}: pass --rand-augment none"
        )
    if config.pool == "cls" and not architecture.class_token:
        raise UserError(f"pool cls: {architecture.model} has no class token, pass --pool mean")
    for name in ("epochs", "batch_size", "accumulate"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("label_smoothing", "drop_path", "random_erase"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")
    for name in ("mixup", "cutmix", "base_lr", "min_lr", "weight_decay", "clip_grad"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"{name} is {value}; it must not be negative")
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"layer_decay is {config.layer_decay}; it must lie between 0 and 1")
    duration_steps(config.warmup, 100, 10)
    duration_steps(config.checkpoint_every, 100, 10)


def finetune(
    config: Options,
    subject: EvaluatedBackbone,
    weights: dict[str, Tensor] | None,
    data: Labelled,
    folder: Path,
    reading: ImageReader,
) -> TrueClassRanks:
    """Train a classifier from these encoder weights (None: random ones), then test it.

    Saves into `folder`, and resumes from there. The test images are used only after the last step.
    """
    check_finetune(config, subject.architecture)
    with random_state_kept(subject.backbone.mean.device):
        run = FinetuningRun(config, subject, weights, data, folder)
        try:
            run.resume()
            if run.step < run.total_steps:
                run.train()
            run.save_classifier()
            return run.test(reading)
        finally:
            run.files.release()


class FinetuningRun:
    """The state of a fine-tuning; implements `Training` of the loop.

    The arguments are those of `finetune`.
    """

    log_every = LOG_EVERY

    def __init__(
        self,
        config: Options,
        subject: EvaluatedBackbone,
        weights: dict[str, Tensor] | None,
        data: Labelled,
        folder: Path,
    ):
        self.config, self.subject, self.data = config, subject, data
        self.mean, self.std = subject.backbone.mean, subject.backbone.std
        self.device = self.mean.device
        self.channels = subject.architecture.channels
        height, width = pair(config.image_size or subject.architecture.image_size)
        self.size = (height, width)
        _check_depth(config, data)
        self.images_per_step = _images_per_step(config, len(data.train))
        self.steps_per_epoch = len(data.train) // self.images_per_step
        self.total_steps = config.epochs * self.steps_per_epoch
        self.augmentation = Augmentation(
            config, self.mean, self.channels, self.size, len(data.classes)
        )
        self.model: Classifier = build_classifier(
            subject.architecture,
            weights,
            len(data.classes),
            config.pool,
            self.size,
            config.drop_path,
            config.seed,
        ).to(self.device)
        groups = layer_decay_groups(
            self.model, config.base_lr, config.layer_decay, config.weight_decay
        )
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True)
        self.unreadable = UnreadableImages(data.train, config.max_unreadable)
        self.files = TrainingFolder(folder, "fine-tuning", self._identity())
        self.step = 0

    @property
    def classifier_file(self) -> Path:
        """The file of the trained classifier."""
        return self.files.folder / "classifier.safetensors"

    @cached_property
    def labels(self) -> Tensor:
        """Labels of all training images, int64."""
        return torch.from_numpy(np.asarray(self.data.train_labels, dtype=np.int64))

    def resume(self) -> None:
        """Lock the folder, unless the training is finished, and resume from its checkpoint."""
        finished = distributed.from_main(self.classifier_file.exists())
        if not finished and (note := self.files.claim()):
            say(note)
        self.step = self.files.resume(self.model, self.optimizer, self.unreadable)

    def train(self) -> None:
        """Run the remaining steps."""
        config = self.config
        self.log = RunLog(self.files.folder, self.step, self.total_steps, distributed.is_main())
        self.log.info(
            f"fine-tuning {self.subject.name}: {counted(len(self.data.train), 'image')} of "
            f"{counted(len(self.data.classes), 'class', 'classes')}, "
            f"{counted(self.total_steps, 'step')} of {self.images_per_step}, "
            f"from step {self.step}, into {self.files.folder}"
        )
        for line in long_warmup(config.warmup, self._steps(config.warmup), self.total_steps):
            self.log.info(line)
        self.parallel = distributed.data_parallel(self.model.train())
        try:
            with stop_signals() as stop:
                train(self, self.train_step, stop)
        finally:
            self.log.close()

    def train_step(self, batch: Batch, step: int) -> StepResult:
        """Cross-entropy of erased and mixed images; one update of all layers."""
        config = self.config
        seed_everything(config.seed, step, distributed.rank(), 1)
        losses = []
        for part in accumulated(self.parallel, batch.parts(config.accumulate)):
            images = normalize(part.images.to(self.device), self.mean, self.std)
            labels = self.labels[part.indices].to(self.device)
            loss = self.augmentation.loss(self.parallel, images, labels, self.autocast)
            (loss / config.accumulate).backward()
            losses.append(loss.detach())
        optimizer_step(self.model, self.optimizer, self.learning_rate(step), config.clip_grad)
        return StepResult({"loss": torch.stack(losses).mean()})

    def learning_rate(self, step: int) -> float:
        """Learning rate of the top layer in a 0-based step."""
        config = self.config
        peak = config.base_lr * self.images_per_step / 256
        warmup = self._steps(config.warmup)
        return learning_rate(step, self.total_steps, warmup, peak, config.min_lr)

    def batches(self) -> Iterator[Batch]:
        """This process's part of each batch, from `step` to the last."""
        config, world_size = self.config, distributed.world_size()
        sampler = StepSampler(
            len(self.data.train),
            self.images_per_step,
            self.total_steps,
            config.seed,
            self.step,
            distributed.rank(),
            world_size,
        )
        loader = training_loader(
            self.data.train,
            self.augmentation.views,
            sampler,
            num_workers(config.workers),
            self.device.type == "cuda",
        )
        return counted_batches(loader, self.unreadable, self.images_per_step // world_size)

    def autocast(self) -> torch.autocast:
        """Autocast context for a forward pass."""
        return autocast(self.device, self.config.precision)

    def describe(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
        """(learning rate of the last step for the log, loss for the progress bar)."""
        return {"learning_rate": self.learning_rate(self.step - 1)}, f"loss {means['loss']:.4f}"

    def not_finite(self, batch: Batch, result: StepResult) -> UserError:
        return UserError(
            f"the loss is not finite at step {self.step}: lower --base-lr, or pass "
            "--precision float32, in another --out"
        )

    def saves(self, steps_done: int) -> bool:
        save_every = max(1, round(self._steps(self.config.checkpoint_every)))
        return every(save_every, self.total_steps)(steps_done)

    def save(self) -> None:
        """Write a checkpoint."""
        self.files.save(self.model, self.optimizer, self.step, self.unreadable)

    def save_classifier(self) -> None:
        """Write the trained classifier, unless it exists."""
        if distributed.from_main(self.classifier_file.exists()):
            return
        about = {
            "kind": "hpm classifier",
            "architecture": dataclasses.replace(
                self.subject.architecture, image_size=self.size
            ).to_json(),
            "pool": self.config.pool,
            "classes": self.data.classes,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }
        state = self.model.state_dict()
        distributed.main_first(lambda: write_tensors(self.classifier_file, state, about))

    @torch.inference_mode()
    def test(self, reading: ImageReader) -> TrueClassRanks:
        """The rank of the true class of each test image."""
        self.model.eval()
        labels = torch.from_numpy(np.asarray(self.data.test_labels, dtype=np.int64))
        ids, parts = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for batch in reading.batches(self.data.test, self.size, self.channels):
            with self.autocast():
                logits = self.model(normalize(batch.images.to(self.device), self.mean, self.std))
            ids.append(batch.indices)
            parts.append(rank(logits.float().cpu(), labels[batch.indices]).ranks)
        all_ids = distributed.rows_of_all(torch.cat(ids))
        if not len(all_ids):
            raise UserError(f"{self.data.test.name}: no readable image")
        order = all_ids.argsort()
        ranks = distributed.rows_of_all(torch.cat(parts))
        return TrueClassRanks(ranks[order], labels[all_ids[order]])

    def _steps(self, duration: str) -> float:
        return duration_steps(duration, self.total_steps, self.steps_per_epoch)

    def _identity(self) -> dict[str, Any]:
        """Everything that must be unchanged to resume."""
        options = dataclasses.asdict(self.config)
        kept = {name: value for name, value in options.items() if name not in MAY_CHANGE}
        return kept | {
            "images": len(self.data.train),
            "classes": self.data.classes,
            "images_per_step": self.images_per_step,
            "weights": weights_fingerprint(self.model),
        }


def _check_depth(config: Options, data: Labelled) -> None:
    if config.rand_augment != "none" and data.train.is_deep():
        raise UserError(
            f"rand_augment knows 8 bits, but {data.train.name} has images of more: "
            "pass --rand-augment none"
        )


def _images_per_step(config: Options, num_images: int) -> int:
    """Images per step over all processes: an even number for each part of each process, because
    mixup pairs images."""
    world_size = distributed.world_size()
    share = 2 * world_size * config.accumulate
    most = min(config.batch_size, num_images)
    if most < share:
        raise UserError(
            f"{counted(most, 'image')} cannot be a batch of "
            f"{counted(world_size, 'process', 'processes')}, accumulate "
            f"{config.accumulate}: {share} or more can"
        )
    return most // share * share

"""UPerNet: the whole encoder fine-tuned with labels of pixels (BEiT; MAE, appendix A.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.progress import say
from hpm.core.random_state import random_state_kept
from hpm.core.signals import stop_signals
from hpm.data.dense import DenseBatch, dense_loader
from hpm.data.loader import StepSampler, normalize
from hpm.data.mask_files import IGNORED
from hpm.evals.features import EvaluatedBackbone
from hpm.models.build import resized_encoder
from hpm.models.seeds import seeded
from hpm.models.segmenter import UPerNetSegmenter, segmentation_loss
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
from hpm.training.optim import layer_decay_groups, polynomial_rate
from hpm.training.schedule import long_warmup
from hpm.training.sync_norm import batch_norm
from hpm.weights.segmentation import SegmentationModel

if TYPE_CHECKING:
    from hpm.evals.segment.job import SegmentationJob

LOG_EVERY = 10
# Options that say how it is run or tested, not what it learns: they may differ when it goes on.
FREE = {
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
    "stride",
    "figure_images",
    "lr",
    "steps",
    "image_size",
}


def train_upernet(
    job: SegmentationJob,
    backbone: EvaluatedBackbone,
    weights: dict[str, Tensor] | None,
    folder: Path,
) -> SegmentationModel:
    """A segmenter trained from these encoder weights (random ones for None).

    Saves into `folder`, and goes on from there; a finished training is only loaded.
    """
    with random_state_kept(job.task.device):
        run = UPerNetTraining(job, backbone, weights, folder)
        try:
            run.resume()
            if run.step < run.total_steps:
                run.train()
            return run.trained_model()
        finally:
            run.files.release()


class UPerNetTraining:
    """A training at the step where it stands: a `Training` of the loop.

    The arguments are those of `train_upernet`.
    """

    log_every = LOG_EVERY

    def __init__(
        self,
        job: SegmentationJob,
        backbone: EvaluatedBackbone,
        weights: dict[str, Tensor] | None,
        folder: Path,
    ):
        options = job.options
        self.job, self.options, self.backbone = job, options, backbone
        self.device = job.task.device
        self.mean, self.std = backbone.backbone.mean, backbone.backbone.std
        # Batch norms need two crops or more in every part.
        self.images_per_step = job.images_per_step(
            2 * distributed.world_size() * options.accumulate
        )
        self.steps_per_epoch = len(job.train) // self.images_per_step
        self.total_steps = job.steps
        side = (job.image_size, job.image_size)
        with seeded(options.seed):
            encoder = resized_encoder(backbone.architecture, weights, side, options.drop_path)
            self.model = UPerNetSegmenter(
                encoder,
                len(job.classes),
                options.channels,
                norm_layer=batch_norm(self.device),
                dropout=options.dropout,
            ).to(self.device)
        groups = layer_decay_groups(
            self.model, options.peak_lr, options.layer_decay, options.weight_decay
        )
        self.optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)
        self.unreadable = job.task.unreadable(job.train)
        self.files = TrainingFolder(folder, "training of UPerNet", self._identity())
        self.step = 0

    def resume(self) -> None:
        """Lock the folder and go on from its checkpoint."""
        if note := self.files.claim():
            say(note)
        self.step = self.files.resume(self.model, self.optimizer, self.unreadable)

    def train(self) -> None:
        """All steps that are left."""
        options, job = self.options, self.job
        self.log = RunLog(self.files.folder, self.step, self.total_steps, distributed.is_main())
        self.log.info(
            f"UPerNet from {self.backbone.name}: {counted(len(job.train), 'image')} of "
            f"{counted(len(job.classes), 'class', 'classes')}, "
            f"{counted(self.total_steps, 'step')} of {self.images_per_step} crops of "
            f"{job.image_size} pixels, from step {self.step}, into {self.files.folder}"
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
        """Cross-entropy over the labelled pixels of the batch of all processes; one update."""
        options = self.options
        _seed_dropout(options.seed, step, distributed.rank())
        parts = batch.parts(options.accumulate)
        labelled = torch.stack([_labelled(part).sum() for part in parts]).float().to(self.device)
        mean_labelled = distributed.mean(labelled.sum()).clamp(min=1)  # of a process
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(accumulated(self.parallel, parts)):
            images = normalize(_tensor(part.images).to(self.device), self.mean, self.std)
            targets = _tensor(part.targets).to(self.device)
            with autocast(self.device, options.precision):
                logits, auxiliary = self.parallel(images)
            loss = segmentation_loss(logits, auxiliary, targets)
            # Its mean is over the pixels of this part; every pixel of the batch counts alike.
            loss = loss * labelled[number] / mean_labelled
            loss.backward()
            total += loss.detach()
        optimizer_step(self.model, self.optimizer, self.learning_rate(step), options.clip_grad)
        return StepResult({"loss": total})

    def learning_rate(self, step: int) -> float:
        """Of the head, in a 0-based step."""
        options = self.options
        return polynomial_rate(
            step,
            self.total_steps,
            self._steps(options.warmup),
            options.peak_lr,
            options.power,
            options.warmup_lr,
            options.min_lr,
        )

    def batches(self) -> Iterator[DenseBatch]:
        """This process's part of each batch, from the present step to the last."""
        job, world_size = self.job, distributed.world_size()
        sampler = StepSampler(
            len(job.train),
            self.images_per_step,
            self.total_steps,
            self.options.seed,
            self.step,
            distributed.rank(),
            world_size,
        )
        loader = dense_loader(
            job.train,
            job.training_views(self.backbone, job.train),
            sampler,
            job.task.workers,
            self.device.type == "cuda",
        )
        return counted_batches(loader, self.unreadable, self.images_per_step // world_size)

    def describe(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
        """The learning rate of the last step, for the log; the loss, for the progress bar."""
        return {"learning_rate": self.learning_rate(self.step - 1)}, f"loss {means['loss']:.4f}"

    def not_finite(self, batch: DenseBatch, result: StepResult) -> UserError:
        return UserError(
            f"the loss is not finite at step {self.step}: lower --peak-lr, or pass "
            "--precision float32, in another --out"
        )

    def saves(self, steps_done: int) -> bool:
        save_every = max(1, round(self._steps(self.options.checkpoint_every)))
        return every(save_every, self.total_steps)(steps_done)

    def save(self) -> None:
        """Write a checkpoint."""
        self.files.save(self.model, self.optimizer, self.step, self.unreadable)

    def trained_model(self) -> SegmentationModel:
        """What was trained, in evaluation mode, with its preprocessing."""
        model = SegmentationModel(
            self.model,
            self.backbone.architecture,
            self.job.classes,
            self.mean.tolist(),
            self.std.tolist(),
            self.job.stride,
        )
        return model.to(self.device).eval()

    def _steps(self, duration: str) -> float:
        return duration_steps(duration, self.total_steps, self.steps_per_epoch)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        options = dataclasses.asdict(self.options)
        kept = {name: value for name, value in options.items() if name not in FREE}
        return kept | {
            "steps": self.total_steps,
            "image_size": self.job.image_size,
            "images": len(self.job.train),
            "classes": self.job.classes,
            "images_per_step": self.images_per_step,
            "weights": weights_fingerprint(self.model),
        }


def _labelled(batch: DenseBatch) -> Tensor:
    return _tensor(batch.targets) != IGNORED


def _tensor(values: Any) -> Tensor:
    """Crops are of one size, and so one tensor."""
    assert isinstance(values, Tensor)
    return values


def _seed_dropout(*key: int) -> None:
    """Stochastic depth and dropout are a function of (seed, step, process)."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(word >> np.uint64(1)))

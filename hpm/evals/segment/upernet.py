"""UPerNet: fine-tune the whole encoder for segmentation (BEiT; MAE, appendix A.4)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.errors import counted
from hpm.core.random_state import random_state_kept
from hpm.data.dense import DenseBatch, dense_loader
from hpm.data.loader import StepSampler, normalize
from hpm.data.mask_files import IGNORED
from hpm.evals.features import EvaluatedBackbone
from hpm.models.build import resized_encoder
from hpm.models.seeds import seeded
from hpm.models.segmenter import UPerNetSegmenter, segmentation_loss
from hpm.training.loop import StepResult, accumulated, optimizer_step
from hpm.training.optim import polynomial_rate
from hpm.training.supervised import SupervisedTraining, full_batch
from hpm.training.sync_norm import batch_norm
from hpm.weights.segmentation import SegmentationModel

if TYPE_CHECKING:
    from hpm.evals.segment.job import SegmentationJob


def train_upernet(
    job: SegmentationJob,
    backbone: EvaluatedBackbone,
    weights: dict[str, Tensor] | None,
    folder: Path,
) -> SegmentationModel:
    """Train a segmenter from these encoder weights (None: random ones).

    Saves into `folder`, and resumes from there.
    """
    with random_state_kept(job.task.device):
        training = UPerNetTraining(job, backbone, weights, folder)
        with training.completed():
            return training.trained_model()


class UPerNetTraining(SupervisedTraining):
    """A training of UPerNet; the arguments are those of `train_upernet`."""

    kind = "training of UPerNet"
    trained_name = "segmenter.safetensors"
    against_divergence = "lower --peak-lr"
    model: UPerNetSegmenter

    def __init__(
        self,
        job: SegmentationJob,
        backbone: EvaluatedBackbone,
        weights: dict[str, Tensor] | None,
        folder: Path,
    ):
        options = job.options
        self.job, self.backbone = job, backbone
        self.mean, self.std = backbone.backbone.mean, backbone.backbone.std
        side = (job.image_size, job.image_size)
        with seeded(options.seed):
            encoder = resized_encoder(backbone.architecture, weights, side, options.drop_path)
            model = UPerNetSegmenter(
                encoder,
                len(job.classes),
                options.channels,
                norm_layer=batch_norm(job.task.device),
                dropout=options.dropout,
            ).to(job.task.device)
        # Batch norm needs at least two crops in every part.
        images_per_step = full_batch(
            options.batch_size, len(job.train), options.accumulate, at_least=2
        )
        identity = {"steps": job.steps, "image_size": job.image_size, "classes": job.classes}
        super().__init__(
            options,
            model,
            job.train,
            images_per_step,
            job.steps,
            options.peak_lr,
            folder,
            identity,
        )

    def summary(self) -> str:
        return (
            f"UPerNet from {self.backbone.name}: {counted(len(self.source), 'image')} of "
            f"{counted(len(self.job.classes), 'class', 'classes')}, crops of "
            f"{self.job.image_size} pixels"
        )

    def train_step(self, batch: DenseBatch, step: int) -> StepResult:
        """One update with the cross-entropy over the labelled pixels of the batch of all
        processes."""
        options = self.options
        _seed_dropout(options.seed, step, distributed.rank())
        parts = batch.parts(options.accumulate)
        labelled = torch.stack([_labelled(part).sum() for part in parts]).float()
        labelled = labelled.to(self.device, non_blocking=True)
        mean_labelled = distributed.mean(labelled.sum()).clamp(min=1)  # of a process
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(accumulated(self.parallel, parts)):
            images = _tensor(part.images).to(self.device, non_blocking=True)
            images = normalize(images, self.mean, self.std)
            targets = _tensor(part.targets).to(self.device, non_blocking=True)
            with self.autocast():
                logits, auxiliary = self.parallel(images)
            loss = segmentation_loss(logits, auxiliary, targets)
            # Its mean is over the pixels of this part; every pixel of the batch counts alike.
            loss = loss * labelled[number] / mean_labelled
            loss.backward()
            total += loss.detach()
        optimizer_step(self.model, self.optimizer, self.learning_rate(step), options.clip_grad)
        return StepResult({"loss": total})

    def learning_rate(self, step: int) -> float:
        options = self.options
        return polynomial_rate(
            step,
            self.total_steps,
            self.duration(options.warmup),
            options.peak_lr,
            options.power,
            options.warmup_lr,
            options.min_lr,
        )

    def loader(self, sampler: StepSampler) -> Iterable[DenseBatch]:
        task, views = self.job.task, self.job.training_views(self.backbone, self.source)
        return dense_loader(self.source, views, sampler, task.workers, self.device.type == "cuda")

    def trained_model(self) -> SegmentationModel:
        """The trained segmenter in evaluation mode, with its preprocessing."""
        model = SegmentationModel(
            self.model,
            self.backbone.architecture,
            self.job.classes,
            self.mean.tolist(),
            self.std.tolist(),
            self.job.stride,
        )
        return model.to(self.device).eval()


def _labelled(batch: DenseBatch) -> Tensor:
    return _tensor(batch.targets) != IGNORED


def _tensor(values: Any) -> Tensor:
    """The crops as one tensor: all are of the same size."""
    assert isinstance(values, Tensor)
    return values


def _seed_dropout(*key: int) -> None:
    """Make stochastic depth and dropout a function of (seed, step, process)."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(word >> np.uint64(1)))

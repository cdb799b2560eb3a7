"""Fine-tuning: the whole encoder trained with labels (the recipe of DeiT and MAE, appendix A.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.config import pair
from hpm.core.errors import UserError, counted
from hpm.core.options import check_rules
from hpm.core.random_state import random_state_kept
from hpm.core.wording import sample_word
from hpm.data.loader import Batch, StepSampler, normalize, training_loader, training_views
from hpm.data.video.sampling import ClipSampling
from hpm.data.workers import num_workers
from hpm.evals.features import EvaluatedBackbone, ImageReader, Labelled
from hpm.evals.finetune import Options
from hpm.evals.finetune.augmentation import Augmentation, seed_everything
from hpm.evals.metrics import TrueClassRanks, mean_probabilities, rank
from hpm.models.architecture import Architecture
from hpm.models.build import build_classifier, check_image_size
from hpm.models.classifier import Classifier
from hpm.training.loop import StepResult, accumulated, optimizer_step
from hpm.training.optim import learning_rate
from hpm.training.supervised import SupervisedTraining, full_batch
from hpm.weights.classification import ClassificationModel, write_classifier


def check_finetune(config: Options, architecture: Architecture) -> None:
    """Raise UserError for the first invalid option."""
    check_image_size(input_size(config, architecture), architecture.patch_size)
    if config.rand_augment != "none" and architecture.channels not in (1, 3):
        raise UserError(
            f"rand_augment knows grey and RGB, but this backbone has "
            f"{counted(architecture.channels, 'channel')}: pass --rand-augment none"
        )
    if config.pool == "cls" and not architecture.class_token:
        raise UserError(f"pool cls: {architecture.model} has no class token, pass --pool mean")
    check_rules(config)


def input_size(config: Options, architecture: Architecture) -> tuple[int, ...]:
    """Size of the images or clips to fine-tune on."""
    size = architecture.image_size
    return (*size[:-2], *pair(config.image_size)) if config.image_size else size


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
        training = ClassifierTraining(config, subject, weights, data, folder, reading.sampling)
        with training.completed():
            training.save_classifier()
            return training.test(reading)


class ClassifierTraining(SupervisedTraining):
    """A fine-tuning; the arguments are those of `finetune`. sampling: of the training clips."""

    trained_name = "classifier.safetensors"
    against_divergence = "lower --base-lr"
    model: Classifier

    def __init__(
        self,
        config: Options,
        subject: EvaluatedBackbone,
        weights: dict[str, Tensor] | None,
        data: Labelled,
        folder: Path,
        sampling: ClipSampling | None = None,
    ):
        self.subject, self.data, self.sampling = subject, data, sampling
        self.sample = sample_word(sampling is not None)
        self.mean, self.std = subject.backbone.mean, subject.backbone.std
        self.channels = subject.architecture.channels
        self.size = input_size(config, subject.architecture)
        height, width = self.size[-2:]
        self.view_size = (height, width)
        _check_depth(config, data)
        # An even number in each part, because mixup pairs images; all views of an image in one
        # process.
        at_least = math.lcm(2, config.repeat_augment)
        images_per_step = full_batch(
            config.batch_size, len(data.train), config.accumulate, at_least
        )
        views = training_views(
            data.train,
            self.view_size,
            self.channels,
            config.seed,
            config.crop_scale,
            config.flip,
            1,
            sampling,
        )
        self.augmentation = Augmentation(config, self.mean, views, len(data.classes))
        model = build_classifier(
            subject.architecture,
            weights,
            len(data.classes),
            config.pool,
            self.size,
            config.drop_path,
            config.seed,
        ).to(self.mean.device)
        total_steps = config.epochs * (len(data.train) // images_per_step)
        identity = {"classes": data.classes}
        super().__init__(
            config,
            model,
            data.train,
            images_per_step,
            total_steps,
            config.base_lr,
            folder,
            identity,
            config.repeat_augment,
        )

    @cached_property
    def labels(self) -> Tensor:
        """Labels of all training images, int64."""
        return torch.from_numpy(np.asarray(self.data.train_labels, dtype=np.int64))

    def summary(self) -> str:
        return (
            f"fine-tuning {self.subject.name}: "
            f"{counted(len(self.source), self.sample)} of "
            f"{counted(len(self.data.classes), 'class', 'classes')}"
        )

    def train_step(self, batch: Batch, step: int) -> StepResult:
        """Cross-entropy of erased and mixed images; one update of all layers."""
        config = self.options
        seed_everything(config.seed, step, distributed.rank(), 1)
        losses = []
        for part in accumulated(self.parallel, batch.parts(config.accumulate)):
            images = part.images.to(self.device, non_blocking=True)
            images = normalize(images, self.mean, self.std)
            labels = self.labels[part.indices].to(self.device, non_blocking=True)
            loss = self.augmentation.loss(self.parallel, images, labels, self.autocast)
            (loss / config.accumulate).backward()
            losses.append(loss.detach())
        optimizer_step(self.model, self.optimizer, self.learning_rate(step), config.clip_grad)
        return StepResult({"loss": torch.stack(losses).mean()})

    def learning_rate(self, step: int) -> float:
        """Learning rate of the top layer in a 0-based step."""
        config = self.options
        peak = config.base_lr * self.images_per_step / 256
        warmup = self.duration(config.warmup)
        return learning_rate(step, self.total_steps, warmup, peak, config.min_lr)

    def loader(self, sampler: StepSampler) -> Iterable[Batch]:
        workers, on_gpu = num_workers(self.options.workers), self.device.type == "cuda"
        return training_loader(self.source, self.augmentation.views, sampler, workers, on_gpu)

    def save_classifier(self) -> None:
        """Write the trained classifier, unless it exists."""
        if distributed.from_main(self.trained_file.exists()):
            return
        trained = ClassificationModel(
            self.model,
            dataclasses.replace(self.subject.architecture, image_size=self.size),
            self.data.classes,
            self.mean.tolist(),
            self.std.tolist(),
            self.sampling.stride if self.sampling else None,
        )
        distributed.main_first(lambda: write_classifier(trained, self.trained_file))

    @torch.inference_mode()
    def test(self, reading: ImageReader) -> TrueClassRanks:
        """The rank of the true class of each test image, by the mean probabilities of its views."""
        self.model.eval()
        labels = torch.from_numpy(np.asarray(self.data.test_labels, dtype=np.int64))
        ids, parts = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for batch in reading.batches(self.data.test, self.view_size, self.channels):
            with self.autocast():
                logits = self.model(normalize(batch.images.to(self.device), self.mean, self.std))
            ids.append(batch.indices)
            scores = mean_probabilities(logits.float().cpu(), reading.grid.count)
            parts.append(rank(scores, labels[batch.indices]).ranks)
        all_ids = distributed.rows_of_all(torch.cat(ids))
        if not len(all_ids):
            raise UserError(f"{self.data.test.name}: no readable image")
        order = all_ids.argsort()
        ranks = distributed.rows_of_all(torch.cat(parts))
        return TrueClassRanks(ranks[order], labels[all_ids[order]])


def _check_depth(config: Options, data: Labelled) -> None:
    if config.rand_augment != "none" and data.train.is_deep():
        raise UserError(
            f"rand_augment knows 8 bits, but {data.train.name} has images of more: "
            "pass --rand-augment none"
        )

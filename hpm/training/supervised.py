"""Trainings with labels: fine-tuning, segmentation and detection.

A subclass of `SupervisedTraining` builds the model and defines `train_step`, `learning_rate`,
`loader` and `summary`. The rest is here: the optimiser, the folder with its lock and checkpoints,
the log, and the methods that the loop needs (see `hpm.training.loop.Training`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hpm.core import distributed
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.options import describe
from hpm.core.progress import say
from hpm.core.signals import stop_signals
from hpm.data.fingerprint import annotated
from hpm.data.loader import StepSampler
from hpm.data.sources import Source
from hpm.data.unreadable import UnreadableImages
from hpm.training.first_lines import long_warmup
from hpm.training.folder import TrainingFolder, weights_fingerprint
from hpm.training.log import RunLog
from hpm.training.loop import StepResult, autocast, counted_batches, every, train
from hpm.training.optim import layer_decay_groups


class SupervisedTraining(ABC):
    """A training with labels, at the step where it stands.

    Args:
        options: a dataclass of options, with those of `hpm.evals.finetune` that are not about
            images or the model: seed, warmup, layer_decay, weight_decay, betas, precision,
            max_unreadable and checkpoint_every.
        model: what is trained, on its device.
        source: the training images.
        images_per_step: over all processes.
        total_steps: of the whole training.
        peak_lr: learning rate of the top layer, for the groups of the optimiser.
        folder: for checkpoints and the log.
        identity: further values that must be unchanged to resume, JSON-like. Options count unless
            they are marked `may_change`.
        repeats: views of each image in its batch, each of which counts as an image.
    """

    log_every = 10
    sample = "image"  # what a batch is made of, in messages
    kind: ClassVar[str] = "fine-tuning"  # in messages
    trained_name: ClassVar[str]  # name of the file of the trained model
    against_divergence: ClassVar[str]  # what to do if the loss is not finite

    def __init__(
        self,
        options: Any,
        model: nn.Module,
        source: Source,
        images_per_step: int,
        total_steps: int,
        peak_lr: float,
        folder: Path,
        identity: dict[str, Any],
        repeats: int = 1,
    ):
        self.options, self.model, self.source = options, model, source
        self.images_per_step, self.total_steps = images_per_step, total_steps
        self.steps_per_epoch, self.repeats = len(source) // images_per_step, repeats
        self.device = next(model.parameters()).device
        groups = layer_decay_groups(model, peak_lr, options.layer_decay, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)
        self.unreadable = UnreadableImages(source, options.max_unreadable)
        identity = fixed_options(options) | identity
        identity |= {
            "images": len(source),
            "images_per_step": images_per_step,
            "weights": weights_fingerprint(model),
            "data": distributed.main_first(lambda: annotated(source)),
        }
        self.files = TrainingFolder(folder, self.kind, identity)
        self.step = 0

    @abstractmethod
    def train_step(self, batch: Any, step: int) -> StepResult:
        """One optimiser step."""

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Learning rate of the top layer in a 0-based step."""

    @abstractmethod
    def loader(self, sampler: StepSampler) -> Iterable[Any]:
        """Batches of the samples that the sampler lists."""

    @abstractmethod
    def summary(self) -> str:
        """What is trained on what, for the first line of the log."""

    @property
    def trained_file(self) -> Path:
        """The file of the trained model."""
        return self.files.folder / self.trained_name

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Resume and run the remaining steps. The folder is locked meanwhile, and within the
        context, unless the training was complete before."""
        try:
            self._resume()
            if self.step < self.total_steps:
                self._train()
            yield
        finally:
            self.files.release()

    def _resume(self) -> None:
        complete = distributed.from_main(self.trained_file.exists())
        if not complete and (note := self.files.claim()):
            say(note)
        self.step = self.files.resume(self.model, self.optimizer, self.unreadable)

    def _train(self) -> None:
        self.log = RunLog(self.files.folder, self.step, self.total_steps, distributed.is_main())
        self.log.info(
            f"{self.summary()}, {counted(self.total_steps, 'step')} of {self.images_per_step}, "
            f"from step {self.step}, into {self.files.folder}"
        )
        warmup = self.options.warmup
        for line in long_warmup(warmup, self.duration(warmup), self.total_steps):
            self.log.info(line)
        self.parallel = distributed.data_parallel(self.model.train())
        try:
            with stop_signals() as stop:
                train(self, self.train_step, stop)
        finally:
            self.log.close()

    def batches(self) -> Iterator[Any]:
        """This process's part of each batch, from `step` to the last."""
        world_size = distributed.world_size()
        sampler = StepSampler(
            len(self.source),
            self.images_per_step,
            self.total_steps,
            self.options.seed,
            self.step,
            distributed.rank(),
            world_size,
            self.repeats,
        )
        loader = self.loader(sampler)
        return counted_batches(loader, self.unreadable, self.images_per_step // world_size)

    def autocast(self) -> torch.autocast:
        """Autocast context for a forward pass."""
        return autocast(self.device, self.options.precision)

    def duration(self, text: str) -> float:
        """Number of steps of a duration such as `5%` or `3 epochs`."""
        return duration_steps(text, self.total_steps, self.steps_per_epoch)

    def describe(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
        """(learning rate of the last step for the log, loss for the progress bar)."""
        return {"learning_rate": self.learning_rate(self.step - 1)}, f"loss {means['loss']:.4f}"

    def not_finite(self, batch: Any, result: StepResult) -> UserError:
        return UserError(
            f"the loss is not finite at step {self.step}: {self.against_divergence}, or pass "
            "--precision float32, in another --out"
        )

    def saves(self, steps_done: int) -> bool:
        save_every = max(1, round(self.duration(self.options.checkpoint_every)))
        return every(save_every, self.total_steps)(steps_done)

    def save(self) -> None:
        """Write a checkpoint."""
        self.files.save(self.model, self.optimizer, self.step, self.unreadable)


def fixed_options(options: Any) -> dict[str, Any]:
    """The options, as plain values, that must be unchanged to resume."""
    rules = {name: each.rules for name, each in describe(type(options)).items()}
    values = dataclasses.asdict(options).items()
    return {name: value for name, value in values if not rules[name].may_change}


def full_batch(batch_size: int, num_images: int, accumulate: int = 1, at_least: int = 1) -> int:
    """Images per step over all processes: at most `batch_size`, and equally many in each part of
    each process.

    at_least: in each part; the number is a multiple of it. Raises UserError if there are too few
    images.
    """
    world_size = distributed.world_size()
    multiple = at_least * world_size * accumulate
    most = min(batch_size, num_images)
    if most < multiple:
        raise UserError(
            f"{counted(most, 'image')} cannot be a batch of "
            f"{counted(world_size, 'process', 'processes')}, accumulate {accumulate}: "
            f"{multiple} or more can"
        )
    return most // multiple * multiple

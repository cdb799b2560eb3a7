"""The state of a pre-training; `hpm.training.build.build_run` creates it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpm.core import distributed
from hpm.core.choices import HARD_SHARES
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.files import remove
from hpm.core.shards import whole_state
from hpm.core.wording import sample_word
from hpm.data.cache import Cache
from hpm.data.loader import Batch, TrainingViews, normalize
from hpm.data.unreadable import UnreadableImages
from hpm.data.video.sampling import ClipSampling, clip_sampling
from hpm.mining.masking import hard_share
from hpm.mining.memory import HardnessMemory
from hpm.mining.miner import Miner, Seen
from hpm.mining.teacher import Teacher
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.targets.base import Target
from hpm.training.batches import image_cache, make_views, read_images
from hpm.training.images import TrainingImages
from hpm.training.log import RunLog
from hpm.training.loop import StepResult, autocast, counted_batches
from hpm.training.not_finite import not_finite_error
from hpm.training.schedule import Schedule
from hpm.training.streams import FEWEST_READ, StreamReading, read_stream
from hpm.weights.checkpoint import FILE, FOLDER, checkpoint_tensors, prune, write_checkpoint
from hpm.weights.resolve import Trained, save_backbone
from hpm.weights.run_folder import RunFolder

if TYPE_CHECKING:
    from hpm.weights.shard_writer import ShardWriter


@dataclass
class PretrainingRun:
    """The components and progress of a pre-training; implements `Training` of the loop.

    Args:
        config: resolved (see `schedule.resolve`).
        schedule: durations in steps.
        architecture: of the model.
        images: training and held-out images.
        files: the run folder.
        mean, std: of each channel, on a scale of 0 to 1.
        model: the student.
        teacher: EMA of the student.
        target: computes what is reconstructed.
        memory: memory of losses or predictions for each image, if used.
        optimizer: of the student.
        student: the model for the training step: compiled if configured, and wrapped to average
            gradients over the processes.
        miner: the miner for the training step, compiled if configured.
        eager_miner: the miner for figures and measures, not compiled.
        log: log of numbers and messages.
        unreadable: images that could not be read.
        writer: of the checkpoints, if the models are sharded.
        step: optimiser steps done.
        best_probe: step and top-1 accuracy (%) of the best probe so far.
        probe_seconds: total time of the probes.
        seconds_before: time of the earlier sessions, up to the checkpoint. began: of this one, by
            `time.monotonic`.
        reading: progress in a stream; None if the images are no stream.
    """

    config: PretrainConfig
    schedule: Schedule
    architecture: Architecture
    images: TrainingImages
    files: RunFolder
    device: torch.device
    mean: list[float]
    std: list[float]
    model: MaskedImageModel
    teacher: Teacher[MaskedImageModel]
    target: Target
    memory: HardnessMemory | None
    optimizer: torch.optim.Optimizer
    student: nn.Module
    miner: Miner
    eager_miner: Miner
    log: RunLog
    unreadable: UnreadableImages
    writer: ShardWriter | None = None
    step: int = 0
    best_probe: dict[str, float] = field(default_factory=dict)
    probe_seconds: float = 0.0
    seconds_before: float = 0.0
    began: float = field(default_factory=time.monotonic)
    reading: StreamReading | None = None

    @property
    def total_steps(self) -> int:
        return self.schedule.total

    @property
    def images_per_step(self) -> int:
        return self.config.global_batch_size

    @property
    def seconds(self) -> float:
        """Time of all sessions so far."""
        return self.seconds_before + time.monotonic() - self.began

    def images_read(self) -> int:
        """Number of images that a share of unreadable ones refers to in a stream."""
        return max(FEWEST_READ, self.step * self.images_per_step)

    @property
    def log_every(self) -> int:
        return self.config.log_every

    @property
    def view_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.architecture.image_size[-2:]
        return height, width

    @property
    def sampling(self) -> ClipSampling | None:
        """Which frames make a clip; None for images."""
        return clip_sampling(self.config)

    @property
    def sample(self) -> str:
        """What a batch is made of, for messages: `image` or `clip`."""
        return sample_word(self.sampling is not None)

    @property
    def num_hidden(self) -> int:
        """Number of hidden patches, M."""
        return self.miner.num_hidden

    @cached_property
    def mean_and_std(self) -> Tensor:
        """[2 C], on the device."""
        return torch.tensor([self.mean, self.std], device=self.device)

    @property
    def trained(self) -> Trained:
        """The current model, for measures and figures. A sharded one must be called by all
        processes, equally often."""
        return self._trained(self.model.encoder)

    @property
    def trained_encoder(self) -> Trained:
        """The current encoder, whole, which each process may call on its own. All processes read
        this property."""
        if not self.sharded:
            return self.trained
        encoder = build_encoder(self.architecture, seed=0)
        encoder.load_state_dict(whole_state(self.model.encoder))
        return self._trained(encoder.to(self.device))

    def _trained(self, encoder: Encoder) -> Trained:
        return Trained(
            self.config.out,
            self.architecture,
            self.mean,
            self.std,
            encoder,
            self.model,
            self.teacher.model,
            self.config,
            frame_stride=self.config.frame_stride,
            target=self.target,
            miner=self.eager_miner,
        )

    @cached_property
    def cache(self) -> Cache | None:
        """Decoded images in memory, if they are kept."""
        if self.reading is not None:
            return None
        return image_cache(self.config, self.architecture, self.images.source)

    def batches(self) -> Iterator[Batch]:
        """This process's part of each batch, from `step` to the last."""
        config, source = self.config, self.images.source
        steps = self.step, self.schedule.total
        views = make_views(config, self.architecture, source)
        per_process = config.global_batch_size // distributed.world_size()
        if self.reading is not None:
            assert isinstance(views, TrainingViews), "streams are of images"
            batches = read_stream(config, self.images, self.reading, views, steps, self.device)
            return counted_batches(batches, self.unreadable, per_process)
        if isinstance(views, TrainingViews):
            views.cache = self.cache
            if views.cache:
                self.log.info("decoded images are kept in memory (--cache)")
        loader = read_images(config, source, views, steps, self.device)
        return counted_batches(loader, self.unreadable, per_process)

    def to_device(self, images: Tensor) -> Tensor:
        """Move images [B C H W], or clips [B C T H W], to the device, and normalise them to
        float32."""
        images = images.to(self.device, non_blocking=True)
        return normalize(images, *self.mean_and_std)

    def autocast(self) -> torch.autocast:
        """Autocast context for a forward pass."""
        return autocast(self.device, self.config.precision)

    def seen(self, batch: Batch) -> Seen | None:
        """The images, crops and times of a batch, on the device; None without a memory."""
        if self.memory is None:
            return None
        assert batch.crops is not None, "training views come with their crops"
        return Seen(
            batch.indices.to(self.device, non_blocking=True),
            batch.crops.to(self.device, non_blocking=True),
            batch.times if batch.times is None else batch.times.to(self.device, non_blocking=True),
        )

    def num_hard(self, step: int) -> int:
        """Number of mined patches in a 0-based step: int(M alpha)."""
        config = self.config
        if config.mask not in HARD_SHARES:
            return 0
        progress = self.schedule.hard_share_progress(step)
        alpha = hard_share(progress, *config.hard_shares, config.hard_share_schedule)
        return int(self.num_hidden * alpha)

    def describe(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
        """(scheduled values of the last step for the log, losses for the progress bar)."""
        step = self.step - 1
        values = {
            "learning_rate": self.schedule.learning_rate(step),
            "ema_decay": self.schedule.ema_decay(step),
            "hard_share": self.num_hard(step) / self.num_hidden,
            "epoch": self.step / self.schedule.steps_per_epoch,
        }
        if self.reading is not None:  # the length of an epoch is not known
            del values["epoch"]
        status = f"loss {means['reconstruction_loss']:.4f}"
        if "ranking_accuracy" in means:
            status += f"  ranking {means['ranking_accuracy']:.3f}"
        return values, status

    def not_finite(self, batch: Batch, result: StepResult) -> UserError:
        """Save the batch. The error names the file and the last good checkpoint."""
        seen = {"images": batch.images, "indices": batch.indices}
        return not_finite_error(self.files, self.step, seen | result.tensors, self.config)

    def saves(self, steps_done: int) -> bool:
        return self.schedule.saves(steps_done)

    def save(self) -> None:
        """Write a checkpoint; of a sharded run, begin to."""
        self._write(f"step_{self.step:08d}", keep=self.config.keep_checkpoints)
        if self.step == self.schedule.cooldown_start:
            self._write("before_cooldown")

    def save_best(self) -> None:
        """Write the checkpoint of the best probe, which is never pruned."""
        self._write("best")

    def _write(self, name: str, keep: int | None = None) -> None:
        """Write a checkpoint of this name, in place of one before, and remove all but the latest
        `keep` numbered ones."""
        folder = self.files.checkpoints
        path, other = folder / f"{name}{FILE}", folder / f"{name}{FOLDER}"
        if self.writer is not None:
            path, other = other, path
        models = (self.model, self.teacher.model, self.optimizer)
        meta = self._meta()

        def clean() -> None:
            remove(other)  # of the time before --shard, or after
            if keep is not None:
                prune(folder, keep)

        def write() -> None:
            write_checkpoint(path, *models, meta, self.memory)
            clean()

        if self.writer is None:
            distributed.main_first(write)
        else:
            tensors = checkpoint_tensors(*models, self.memory)
            generators = {n: t for n, t in tensors.items() if n.startswith("rng.")}
            tensors |= distributed.from_main(generators)
            self.writer.write(path, tensors, meta, clean)

    def saving(self) -> AbstractContextManager[None]:
        """A context that ends when everything that was saved in it is written."""
        return nullcontext() if self.writer is None else self.writer.waiting()

    def save_backbone(self, overwrite: bool) -> None:
        """Write the backbone of a finished run, unless it exists. All processes call it."""
        if not distributed.from_main(overwrite or not self.files.backbone.exists()):
            return
        path, encoder = self.files.backbone, self.model.encoder
        state = encoder.state_dict() if not self.sharded else whole_state(encoder, only_main=True)
        stride = self.config.frame_stride
        distributed.main_first(
            lambda: save_backbone(path, state, self.architecture, self.mean, self.std, stride)
        )

    @property
    def sharded(self) -> bool:  # each process holds only shards of the models
        return self.writer is not None

    @property
    def runs_models(self) -> bool:
        """Whether this process takes part in evaluations: of sharded models, all must."""
        return self.sharded or distributed.is_main()

    def _meta(self) -> dict[str, Any]:
        """Of a checkpoint. All processes call it."""
        stream = {} if self.reading is None else {"stream": self.reading.to_json()}
        return stream | {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "architecture": self.architecture.to_json(),
            "mean": self.mean,
            "std": self.std,
            "num_images": self.images.count,
            "fingerprint": self.images.fingerprint,
            "unreadable": sorted(self.unreadable.indices),
            "schedule_start": self.schedule.start,
            "freeze": self.schedule.freeze,
            "best_probe": self.best_probe,
            "probe_seconds": self.probe_seconds,
            "seconds": self.seconds,
        }

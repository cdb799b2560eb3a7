"""The state of a run: everything that a config builds, and that a checkpoint brings back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.config import HARD_SHARES, TIMM, PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.data.cache import make_cache
from hpm.data.fingerprint import fingerprint
from hpm.data.loader import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    StepSampler,
    TrainingViews,
    measure_statistics,
    normalize,
    num_workers,
    training_loader,
)
from hpm.data.sources import Source, hold_out, open_source
from hpm.data.unreadable import UnreadableImages
from hpm.mining.masking import num_hidden_patches
from hpm.mining.memory import HardnessMemory
from hpm.mining.miner import Seen, make_miner
from hpm.mining.teacher import Teacher
from hpm.models.architecture import resolve_model
from hpm.models.build import build_model
from hpm.models.mim import MaskedImageModel
from hpm.models.timm_encoder import HieraEncoder, TimmEncoder, pretrained_weights
from hpm.models.timm_models import timm_input
from hpm.targets.registry import make_target
from hpm.training.log import RunLog
from hpm.training.optim import adamw
from hpm.training.resume import claim
from hpm.training.schedule import few_images, few_steps, long_warmup, make_schedule, resolve
from hpm.weights.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore,
    save_checkpoint,
    write_checkpoint,
)
from hpm.weights.resolve import Trained, save_backbone
from hpm.weights.run_folder import Run
from hpm.weights.third_party import initialise


class State:
    """Data, model, teacher, optimiser and log of a run, at the step where it stands.

    Building it goes on from the latest checkpoint of the run folder, if there is one. Raises
    UserError where the folder, the data or the weights do not fit the config.
    """

    def __init__(self, config: PretrainConfig, device: torch.device):
        splits = open_source(config.data)
        self.device = device
        self.has_split = splits.test is not None
        self.source, self.held_out = _split(splits.train, splits.test, config)
        self.run = Run(Path(config.out))
        if config.base_lr is None:
            config = dataclasses.replace(config, base_lr=distributed.from_main(self.run.base_lr()))
        self.config = config = resolve(config, len(self.source), device, distributed.world_size())
        self.schedule = make_schedule(config, len(self.source))
        self.architecture = resolve_model(config)
        height, width = self.architecture["image_size"]
        self.image_size = (height, width)
        self.best_probe: dict[str, float] = {}  # step and top-1 of the best so far
        self.probe_seconds = 0.0
        self.min_side = min(self.architecture["patch_size"])
        self.fingerprint = distributed.main_first(lambda: fingerprint(splits.train))
        lock_note = distributed.main_first(
            lambda: claim(self.run, config, len(self.source), self.fingerprint)
        )
        latest = distributed.from_main(self.run.latest_checkpoint())
        checkpoint = load_checkpoint(latest) if latest else None
        if checkpoint:
            self.mean, self.std = checkpoint.meta["mean"], checkpoint.meta["std"]
        else:
            self.mean, self.std = self._statistics()
        self.normalization = torch.tensor([self.mean, self.std], device=device)
        self.target = make_target(config, self.architecture, self.mean, self.std, device)
        self.architecture["target_dim"] = self.target.dim
        self.step = 0
        self.unreadable = UnreadableImages(self.source, config.max_unreadable)
        self._said: set[str] = set()

        self.model = build_model(self.architecture, config.seed).to(device)
        self.num_hidden = num_hidden_patches(self.model.encoder.num_patches, config.mask_ratio)
        messages = [lock_note] if lock_note else []
        if config.init and not latest:
            messages.append(self._initialise(Path(config.init)))
        if config.pretrained and not latest:
            messages.append(self._pretrained())
        self.teacher = Teacher(self.model)
        self.memory = self._memory()
        self.optimizer = adamw(self.model, config.peak_lr, config.betas, config.weight_decay)
        if checkpoint:
            self._resume(checkpoint)
            messages.append(f"going on from {latest}, step {self.step}")
        self.compiled = _compiles(config, device)
        _checkpoint_activations(self.model, config.checkpoint_activations)
        # Only the training step runs what is compiled, always on one shape. Figures, measures and
        # probes take the modules themselves, whose other shapes would compile it anew.
        self.parallel = distributed.data_parallel(self._compile(self.model))
        self.eager_miner = make_miner(
            config, self.architecture, self.teacher.model, self.memory, self.target.needs_teacher
        )
        self.miner = dataclasses.replace(
            self.eager_miner, predict_loss=self._compile(self.eager_miner.model.predict_loss)
        )
        self.log = RunLog(
            self.run.folder, self.step, self.schedule.total, distributed.is_main(), config
        )
        warmup = long_warmup(config.warmup, self.schedule.warmup, self.schedule.total)
        few = [] if checkpoint else few_steps(config, self.schedule.total, len(self.source))
        few += few_images(len(self.source))
        for message in [self._introduction(), *few, *warmup, *messages]:
            self.log.info(message)

    @property
    def trained(self) -> Trained:
        """The model as it is now, for measures and figures."""
        return Trained(
            self.config.out, self.architecture, self.mean, self.std, self.model.encoder,
            self.model, self.teacher.model, self.config, target=self.target, miner=self.eager_miner,
        )  # fmt: skip

    def _compile(self, part: Any) -> Any:
        """A module or function, compiled where the run compiles."""
        return torch.compile(part, dynamic=False) if self.compiled else part

    def batches(self) -> Iterator[Batch]:
        """This process's part of each batch, from the present step to the last."""
        config = self.config
        rank, world_size = distributed.rank(), distributed.world_size()
        views = TrainingViews(
            self.image_size, config.channels, config.seed, config.crop_scale, config.flip,
            self.min_side,
        )  # fmt: skip
        views.cache = make_cache(config.cache, self.source, partial(views.decoded, self.source))
        if views.cache:
            self.log.info("decoded images are kept in memory (--cache)")
        sampler = StepSampler(
            len(self.source), config.global_batch_size, self.schedule.total, config.seed,
            self.step, rank, world_size, config.repeat_augment,
        )  # fmt: skip
        workers = num_workers(config.workers)
        pin_memory = self.device.type == "cuda"
        for batch in training_loader(self.source, views, sampler, workers, pin_memory):
            if len(batch.images) * world_size < config.global_batch_size:
                problem = batch.unreadable[0][1]
                raise UserError(f"{self.source.name}: no readable image ({problem})")
            self.unreadable.add(batch.unreadable)
            yield batch

    def to_device(self, images: Tensor) -> Tensor:
        """A batch's images [B C H W] -> normalised float32 on the device."""
        images = images.to(self.device, non_blocking=True)
        return normalize(images, *self.normalization)

    def seen(self, batch: Batch) -> Seen | None:
        """Which images a batch shows and where in them, on the device, where that is remembered."""
        if self.memory is None:
            return None
        assert batch.crops is not None, "training views come with their crops"
        return Seen(
            batch.indices.to(self.device, non_blocking=True),
            batch.crops.to(self.device, non_blocking=True),
        )

    def autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def count_unreadable(self) -> None:
        """Report what any process could not read; UserError when it is too much (collective)."""
        self.unreadable.check(self.log.info)

    def say_once(self, text: str) -> None:
        """A line of the log, however often it is said."""
        if text not in self._said:
            self._said.add(text)
            self.log.info(text)

    def save(self) -> None:
        """Write a checkpoint."""
        distributed.main_first(
            lambda: save_checkpoint(
                self.run.checkpoints, self.model, self.teacher.model, self.optimizer, self._meta(),
                self.config.keep_checkpoints, self.memory,
            )
        )  # fmt: skip

    def save_best(self) -> None:
        """Write the checkpoint that the probe found best; it is never pruned."""
        distributed.main_first(
            lambda: write_checkpoint(
                self.run.best_checkpoint, self.model, self.teacher.model, self.optimizer,
                self._meta(), self.memory,
            )
        )  # fmt: skip

    def _meta(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "architecture": self.architecture,
            "mean": self.mean,
            "std": self.std,
            "num_images": len(self.source),
            "fingerprint": self.fingerprint,
            "unreadable": self.unreadable.problems,
            "best_probe": self.best_probe,
            "probe_seconds": self.probe_seconds,
        }

    def save_backbone(self) -> None:
        """Write the backbone of a finished run, once."""
        if not self.run.backbone.exists():
            save_backbone(
                self.run.backbone, self.model.encoder, self.architecture, self.mean, self.std
            )

    def _memory(self) -> HardnessMemory | None:
        """Where something is to be remembered: losses, or what the teacher said."""
        config = self.config
        if config.mask not in HARD_SHARES or (config.mine_by, config.mine_every) == ("teacher", 1):
            return None
        return HardnessMemory(len(self.source), self.model.encoder.grid, self.device)

    def _initialise(self, path: Path) -> str:
        """Weights of an earlier run, checkpoint or backbone file, or of others."""
        if path.is_dir():
            run = Run(path)
            path = run.latest_checkpoint() or (run.backbone if run.backbone.exists() else path)
        return initialise(self.model, path, self.config.init_partial, self.config.init_teacher)

    def _pretrained(self) -> str:
        """timm's weights, fetched by one process; the others then find them on the disk."""
        encoder = self.model.encoder
        assert isinstance(encoder, (TimmEncoder, HieraEncoder))

        def load() -> None:
            encoder.load_state_dict(pretrained_weights(encoder))

        distributed.main_first(load)
        if not distributed.is_main():
            load()
        return f"pretrained: the encoder has timm's weights of {self.config.model}"

    def _resume(self, checkpoint: Checkpoint) -> None:
        meta = checkpoint.meta
        restore(checkpoint, self.model, self.teacher.model, self.optimizer, self.memory)
        self.step = meta["step"]
        known = {int(index): text for index, text in meta["unreadable"].items()}
        self.unreadable = UnreadableImages(self.source, self.config.max_unreadable, known)
        self.best_probe = meta.get("best_probe", {})
        self.probe_seconds = meta.get("probe_seconds", 0.0)

    def _statistics(self) -> tuple[list[float], list[float]]:
        if self.config.normalize == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        config = self.config
        if config.normalize == "timm":
            trained_on = timm_input(config.model.removeprefix(TIMM))
            return trained_on.mean, trained_on.std
        return measure_statistics(
            self.source, self.image_size, config.channels, config.seed, self.min_side
        )

    def _introduction(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        held_out = len(self.held_out) if self.held_out else 0
        fewer = ""
        if held_out < self.config.holdout:
            fewer = f" (fewer than the {self.config.holdout} of --holdout: "
            fewer += "the split has no more)" if self.has_split else "at most a tenth of them)"
        memory = self.memory.found.nbytes / 1e6 if self.memory else 0
        return (
            f"{self.config.model} ({parameters / 1e6:.1f} M parameters with decoders), "
            f"{counted(len(self.source), 'image')} of {self.source.name}, {held_out} held out"
            f"{fewer}, {counted(self.schedule.total, 'step')} of "
            f"{counted(self.config.global_batch_size, 'image')} "
            f"({self.schedule.epochs:.4g} epochs), base lr {self.config.base_lr:g}, {self.device}, "
            f"{self.config.precision}, "
            f"{counted(distributed.world_size(), 'process', 'processes')}, into {self.config.out}"
            + (f", memory of hardness {memory:.3g} MB" if memory else "")
        )


def _compiles(config: PretrainConfig, device: torch.device) -> bool:
    return config.compile == "true" or (config.compile == "auto" and device.type == "cuda")


def _checkpoint_activations(model: MaskedImageModel, wanted: bool) -> None:
    for part in (model.encoder, model.reconstructor, model.predictor):
        if part is not None:
            part.checkpoint_activations = wanted


def _split(
    train: Source, test: Source | None, config: PretrainConfig
) -> tuple[Source, Source | None]:
    """(images to train on, images to measure on)."""
    if config.holdout == 0:
        return train, None
    if test is not None:
        return train, hold_out(test, min(config.holdout, len(test)), config.seed)[1]
    count = min(config.holdout, len(train) // 10)
    return hold_out(train, count, config.seed) if count else (train, None)

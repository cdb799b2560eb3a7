"""Hard Patches Mining: the algorithm, top to bottom."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpm import distributed
from hpm.checkpoint import (
    load_checkpoint,
    load_initial,
    read_tensors,
    restore,
    save_checkpoint,
    write_tensors,
)
from hpm.config import (
    PretrainConfig,
    check_pretrain,
    duration_steps,
    make_config,
    read_preset,
    resolve_model,
)
from hpm.data.loader import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    StepSampler,
    TrainingViews,
    default_workers,
    evaluation_batches,
    measure_statistics,
    normalize,
    training_loader,
)
from hpm.data.sources import Source, Subset, hold_out, open_source
from hpm.errors import UserError
from hpm.evals.hardness import measure
from hpm.figures import draw, picture
from hpm.logs import RunLog, memory_gb
from hpm.losses import absolute_loss, ranking_accuracy, relative_loss, squared_error
from hpm.masking import hard_share, hardest_first, hide_top, noise, num_hidden_patches
from hpm.models.build import build_model
from hpm.models.patches import gather_patches
from hpm.optim import adamw, ema_decay, learning_rate
from hpm.run import Run, Trained, save_backbone
from hpm.targets import pixel_target
from hpm.teacher import Teacher

FIGURE_IMAGES = 8


class Interrupted(Exception):
    """The run was told to stop; it has saved its state. `signal_number` says by what."""

    def __init__(self, signal_number: int):
        super().__init__("stopped and saved; the same command goes on from here")
        self.signal_number = signal_number


@dataclass
class Schedule:
    """All durations, in steps."""

    total: int
    steps_per_epoch: int
    warmup: float
    ema_start: float
    ema_end: float
    ema_ramp: float
    evaluate_every: int
    checkpoint_every: int

    @property
    def epochs(self) -> float:
        return self.total / self.steps_per_epoch


def pretrain(config: str | None = None, **options: Any) -> Run:
    """Pre-train a backbone: `hpm.pretrain(data="photos/", out="runs/first", model="vit_small")`.

    Args:
        config: name of a preset, or a YAML file, that the options are laid over.
        options: those of `config.PretrainConfig`.

    Returns the run. Raises UserError on bad input, Interrupted when told to stop.
    """
    preset = read_preset(config) if config else {}
    return run_pretraining(make_config(PretrainConfig, preset | options))


def run_pretraining(config: PretrainConfig) -> Run:
    """Train as configured, or go on with an interrupted run of the same config."""
    check_pretrain(config)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device), _stop_signals() as stop:
        return _Pretraining(config, device).run(stop)


class _Pretraining:
    """The state of a run. `run` is the loop, `mine` to `learn` are one step of the method."""

    def __init__(self, config: PretrainConfig, device: torch.device):
        splits = open_source(config.data)
        self.source, self.held_out = _hold_out(splits.train, splits.test, config)
        self.config = config = resolve(config, len(self.source), device)
        self.device = device
        self.folder = Run(Path(config.out))
        self.schedule = make_schedule(config, len(self.source))
        self.architecture = resolve_model(config)
        height, width = self.architecture["image_size"]
        self.size, self.min_side = (height, width), min(self.architecture["patch_size"])
        problem = self._claim() if distributed.is_main() else None
        problem = distributed.from_main(problem)
        if problem:
            raise UserError(problem)

        self.model = build_model(self.architecture, config.seed).to(device)
        self.num_patches = self.model.encoder.num_patches
        self.num_hidden = num_hidden_patches(self.num_patches, config.mask_ratio)
        self.step = 0
        self.unreadable: dict[int, str] = {}
        latest = distributed.from_main(self.folder.latest_checkpoint())
        checkpoint = load_checkpoint(latest) if latest else None
        messages = []
        if checkpoint is None and config.init:
            messages.append(self._initialise(Path(config.init)))
        self.teacher = Teacher(self.model)
        self.optimizer = adamw(self.model, config.base_lr, config.betas, config.weight_decay)
        if checkpoint:
            self._resume(checkpoint)
            messages.append(f"going on from {checkpoint.path}, step {self.step}")
        else:
            self.mean, self.std = self._statistics()
        self.trained = Trained(
            config.out, self.architecture, self.mean, self.std, self.model.encoder, self.model,
            self.teacher.model, config,
        )  # fmt: skip
        self.parallel = distributed.data_parallel(self.model)
        self.log = RunLog(self.folder.folder, self.step, self.schedule.total, distributed.is_main())
        for message in [self._introduction(), *messages]:
            self.log.info(message)

    def run(self, stop: _Stop) -> Run:
        """All steps that are left."""
        try:
            if self.step < self.schedule.total:
                self._train(stop)
            else:
                self.log.info(f"{self.config.out} is finished already: nothing is changed")
            return self._finish()
        finally:
            self.log.close()

    def _train(self, stop: _Stop) -> None:
        config, schedule = self.config, self.schedule
        window = _Window(self.step)
        batches = iter(self._loader())
        for step in range(self.step, schedule.total):
            batch: Batch = next(batches)
            window.data_wait += time.perf_counter() - window.mark
            if len(batch.images) < _batch_size(config) // distributed.world_size():
                raise UserError(f"{self.source.name}: no readable image")
            self._count_unreadable(batch)

            self._set_learning_rate(step)
            losses, ids = [], []
            parts = _cut(batch, config.accumulate)
            for number, part in enumerate(parts):
                images = self._to_device(part.images)
                visible_ids, hidden_ids = self.mine(images, part.indices, step)
                with distributed.no_gradient_sync(self.parallel, number == len(parts) - 1):
                    losses.append(self.learn(images, visible_ids, hidden_ids))
                ids.append((visible_ids, hidden_ids))
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.teacher.update(self.model, self._ema_decay(step))
            self.step = step + 1

            window.add(torch.stack([*torch.stack(losses).mean(0), grad_norm.detach()]), batch, ids)
            evaluating = _due(self.step, schedule.evaluate_every, schedule.total)
            saving = _due(self.step, schedule.checkpoint_every, schedule.total)
            reading = self.step % config.log_every == 0
            if reading or evaluating or saving or (distributed.world_size() == 1 and stop.received):
                self._read(window)
                stopping = distributed.any_process(bool(stop.received), self.device)
                window = _Window(self.step)
                if evaluating:
                    self._evaluate()
                if saving or stopping:
                    self._save()
                if stopping and self.step < schedule.total:
                    raise Interrupted(stop.received or signal.SIGTERM)
                window.start()
            window.mark = time.perf_counter()

    # One step of the method

    def mine(self, images: Tensor, sample_ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(visible_ids, hidden_ids): the teacher's hardest patches, the rest of M at random."""
        config = self.config
        epoch = step // self.schedule.steps_per_epoch
        sample_ids = sample_ids.to(self.device, non_blocking=True)
        priority = noise(sample_ids, self.num_patches, config.seed, epoch)
        num_hard = self.num_hard(epoch)
        if num_hard > 0:
            with self._autocast():
                _, predicted_loss = self.teacher(images)
            priority = hardest_first(priority, predicted_loss.float(), num_hard)
        return hide_top(priority, self.num_hidden)

    def learn(self, images: Tensor, visible_ids: Tensor, hidden_ids: Tensor) -> Tensor:
        """Reconstruct, predict the own loss, and take both losses backward.

        Returns [reconstruction loss, predictor's loss, ranking accuracy].
        """
        config = self.config
        with self._autocast():
            prediction, predicted_loss = self.parallel(images, visible_ids, hidden_ids)
        target = pixel_target(images, self.model.encoder.patch_size, config.target)
        patch_loss = squared_error(prediction, gather_patches(target, hidden_ids))
        reconstruction_loss = patch_loss.mean()
        predictor_loss = torch.zeros_like(reconstruction_loss)
        accuracy = torch.full_like(reconstruction_loss, math.nan)
        if predicted_loss is not None:
            if config.predictor_loss == "relative":
                total, pairs = relative_loss(predicted_loss, patch_loss)
                # The pairs of all processes count, as if they were one; none differ: no loss.
                predictor_loss = total / distributed.mean(pairs).clamp(min=1)
            else:
                predictor_loss = absolute_loss(predicted_loss, patch_loss)
            accuracy = ranking_accuracy(predicted_loss.detach().float(), patch_loss.detach())
        loss = reconstruction_loss + config.predictor_weight * predictor_loss
        (loss / config.accumulate).backward()
        return torch.stack([reconstruction_loss.detach(), predictor_loss.detach(), accuracy])

    def num_hard(self, epoch: int) -> int:
        """How many of the hidden patches are the hardest ones."""
        config = self.config
        if config.mask == "random":
            return 0
        alpha = hard_share(
            epoch, self.schedule.epochs, config.hard_share_start, config.hard_share_end
        )
        return int(self.num_hidden * alpha)

    # Schedules

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)

    def _learning_rate(self, step: int) -> float:
        peak = self.config.base_lr * _batch_size(self.config) / 256
        return learning_rate(step, self.schedule.total, self.schedule.warmup, peak)

    def _ema_decay(self, step: int) -> float:
        s = self.schedule
        return ema_decay(step, s.ema_start, s.ema_end, s.ema_ramp)

    # Setting up

    def _claim(self) -> str | None:
        try:
            self.folder.claim(self.config)
        except UserError as error:
            return str(error)
        return None

    def _statistics(self) -> tuple[list[float], list[float]]:
        config = self.config
        if config.normalize == "imagenet":
            if config.channels != 3:
                raise UserError("normalize imagenet has 3 channels: pass --normalize measured")
            return IMAGENET_MEAN, IMAGENET_STD
        return measure_statistics(
            self.source, self.size, config.channels, config.seed, self.min_side
        )

    def _initialise(self, path: Path) -> str:
        if path.is_dir():
            run = Run(path)
            path = run.latest_checkpoint() or run.backbone
        state, meta = read_tensors(path)
        if "step" in meta:
            state = load_checkpoint(path).model
        summary = load_initial(self.model, state, path, self.config.init_partial)
        return f"init: {summary}"

    def _resume(self, checkpoint: Any) -> None:
        meta = checkpoint.meta
        if meta["num_images"] != len(self.source):
            raise UserError(
                f"{self.config.data} has {len(self.source)} training images, but the run began "
                f"with {meta['num_images']}: put the data back, or choose another --out"
            )
        restore(checkpoint, self.model, self.teacher.model, self.optimizer)
        self.step, self.mean, self.std = meta["step"], meta["mean"], meta["std"]
        self.unreadable = {int(index): text for index, text in meta["unreadable"].items()}

    def _loader(self) -> Iterator[Batch]:
        config = self.config
        views = TrainingViews(
            self.size, config.channels, config.seed, config.crop_scale, config.flip, self.min_side
        )
        sampler = StepSampler(
            len(self.source), _batch_size(config), self.schedule.total, config.seed, self.step,
            distributed.rank(), distributed.world_size(),
        )  # fmt: skip
        workers = config.workers
        if workers is None:
            workers = default_workers(distributed.world_size())
        pin_memory = self.device.type == "cuda"
        return iter(training_loader(self.source, views, sampler, workers, pin_memory))

    def _introduction(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        held_out = len(self.held_out) if self.held_out else 0
        return (
            f"{self.config.model} ({trained / 1e6:.1f} M parameters with decoders), "
            f"{len(self.source)} images of {self.source.name}, {held_out} held out, "
            f"{self.schedule.total} steps of {self.config.batch_size} images "
            f"({self.schedule.epochs:.4g} epochs), {self.device}, {self.config.precision}, "
            f"{distributed.world_size()} process(es), into {self.config.out}"
        )

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _to_device(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=self.device)
        std = torch.tensor(self.std, device=self.device)
        return normalize(images.to(self.device, non_blocking=True), mean, std)

    # Watching, measuring, saving

    def _count_unreadable(self, batch: Batch) -> None:
        for index, problem in batch.unreadable:
            if index not in self.unreadable:
                self.unreadable[index] = problem
                self.log.info(f"cannot read {self.source.path(index)} ({problem}), passed over")
        if len(self.unreadable) > self.config.max_unreadable * len(self.source):
            raise UserError(
                f"{len(self.unreadable)} of {len(self.source)} images cannot be read, more than "
                f"max_unreadable {self.config.max_unreadable}: mend them (train.log names each), "
                "or pass a larger --max-unreadable"
            )

    def _read(self, window: _Window) -> None:
        """Fetch the losses of the window: the only place that waits for the device."""
        rows = distributed.mean(torch.stack(window.losses)).cpu()
        totals = rows[:, 0] + rows[:, 1] + rows[:, 3]
        if not totals.isfinite().all():
            self._stop_not_finite(window, int((~totals.isfinite()).nonzero()[0]))
        seconds = time.perf_counter() - window.began
        reconstruction, predictor, accuracy, grad_norm = rows.mean(0).tolist()
        epoch = (self.step - 1) // self.schedule.steps_per_epoch
        speed = len(rows) * _batch_size(self.config) / seconds
        values = {"reconstruction_loss": reconstruction}
        if self.model.predictor is not None:
            values |= {"predictor_loss": predictor, "ranking_accuracy": accuracy}
        values |= {
            "grad_norm": grad_norm,
            "learning_rate": self._learning_rate(self.step - 1),
            "ema_decay": self._ema_decay(self.step - 1),
            "hard_share": self.num_hard(epoch) / self.num_hidden,
            "epoch": self.step / self.schedule.steps_per_epoch,
            "images_per_second": speed,
            "data_wait": window.data_wait / seconds,
            "memory_gb": memory_gb(self.device),
            "unreadable": len(self.unreadable),
        }
        self.log.metrics(self.step, values)
        status = f"loss {reconstruction:.4f}"
        if self.model.predictor is not None:
            status += f"  ranking {accuracy:.3f}"
        status += (
            f"  {speed:.0f} images/s  data wait {100 * values['data_wait']:.0f} %"
            f"  {values['memory_gb']:.1f} GB"
        )
        self.log.progress(self.step, status)

    def _stop_not_finite(self, window: _Window, row: int) -> None:
        step = window.first_step + row
        batch, ids = window.batches[row]
        path = self.folder.folder / f"not_finite_step_{step:08d}_rank_{distributed.rank()}"
        tensors = {
            "images": batch.images, "indices": batch.indices,
            "visible_ids": torch.cat([v for v, _ in ids]),
            "hidden_ids": torch.cat([h for _, h in ids]),
            "losses": window.losses[row],
        }  # fmt: skip
        write_tensors(path.with_suffix(".safetensors"), tensors, {"batch_of_step": step})
        latest = self.folder.latest_checkpoint()
        raise UserError(
            f"the loss is not finite at step {step}; last good checkpoint: {latest or 'none yet'}; "
            f"the batch is in {path.name}.safetensors; lower --base-lr, or train in float32"
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure on the held-out images and draw them; the main process alone."""
        if self.held_out is None or not distributed.is_main():
            return
        config = self.config
        with self._autocast():
            values = measure(self.trained, self.held_out, self.device, config.seed)
        if values:
            self.log.metrics(self.step, {f"held_out/{name}": v for name, v in values.items()})
            self.log.info(
                f"step {self.step}, held out: "
                + ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            )
        some = Subset(self.held_out, np.arange(min(FIGURE_IMAGES, len(self.held_out))))
        epoch = (self.step - 1) // self.schedule.steps_per_epoch
        for batch in evaluation_batches(some, self.size, config.channels, FIGURE_IMAGES):
            if len(batch.images):
                share = self.num_hard(epoch) / self.num_hidden
                shown = picture(self.trained, batch.images, batch.indices, share, seed=config.seed)
                draw(
                    shown, self.folder.figures / f"step_{self.step:08d}.png",
                    f"{config.out}, step {self.step} of {self.schedule.total}",
                )  # fmt: skip

    def _save(self) -> None:
        found = distributed.gather(self.unreadable)
        if distributed.is_main():
            meta = {
                "step": self.step,
                "config": dataclasses.asdict(self.config),
                "architecture": self.architecture,
                "mean": self.mean,
                "std": self.std,
                "num_images": len(self.source),
                "unreadable": {i: text for part in found for i, text in part.items()},
            }
            save_checkpoint(
                self.folder.checkpoints, self.model, self.teacher.model, self.optimizer, meta,
                self.config.keep_checkpoints,
            )  # fmt: skip
        distributed.barrier()

    def _finish(self) -> Run:
        run = self.folder
        if distributed.is_main():
            if not run.backbone.exists():
                save_backbone(
                    run.backbone, self.model.encoder, self.architecture, self.mean, self.std
                )
            self.log.info(
                f"done: {run.backbone}\n  import hpm\n"
                f'  encoder = hpm.load_encoder("{self.config.out}")\n'
                "  pooled, patches = encoder(images)  # uint8 [B C H W] -> [B D], [B N D]"
            )
        return run


class _Window:
    """What happened since the losses were last read."""

    def __init__(self, first_step: int):
        self.first_step = first_step
        self.losses: list[Tensor] = []
        self.batches: list[tuple[Batch, list[tuple[Tensor, Tensor]]]] = []
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.began = self.mark = time.perf_counter()
        self.data_wait = 0.0

    def add(self, losses: Tensor, batch: Batch, ids: list[tuple[Tensor, Tensor]]) -> None:
        self.losses.append(losses)
        self.batches.append((batch, ids))


class _Stop:
    """Which signal asked the run to stop, if any did."""

    received: int = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and Ctrl-C ask the loop to save and stop; a second Ctrl-C stops at once."""
    stop = _Stop()

    def receive(number: int, frame: Any) -> None:
        if stop.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.received = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resolve(config: PretrainConfig, num_images: int, device: torch.device) -> PretrainConfig:
    """Replace what was left open by what it means for this data, model and machine."""
    architecture = resolve_model(config)
    batch_size = config.batch_size or min(256, num_images)
    if config.batch_size is None:
        step = config.accumulate * distributed.world_size()
        batch_size = batch_size // step * step
    if not 0 < batch_size <= num_images:
        raise UserError(
            f"a batch of {batch_size or config.accumulate} needs more than the {num_images} images "
            "there are to train on: pass a smaller --batch-size"
        )
    if batch_size % (distributed.world_size() * config.accumulate):
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {distributed.world_size()} processes "
            f"and accumulate {config.accumulate}"
        )
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    height, width = architecture["patch_size"]
    return dataclasses.replace(
        config,
        patch_size=(height, width),
        decoder_dim=architecture["decoder_dim"],
        decoder_depth=architecture["decoder_depth"],
        decoder_heads=architecture["decoder_heads"],
        batch_size=batch_size,
        precision=precision,
    )


def make_schedule(config: PretrainConfig, num_images: int) -> Schedule:
    """Convert every duration to steps, once."""
    steps_per_epoch = num_images // _batch_size(config)
    total = config.steps or config.epochs * steps_per_epoch

    def steps(text: str) -> float:
        return duration_steps(text, total, steps_per_epoch)

    return Schedule(
        total, steps_per_epoch, steps(config.warmup), steps(config.ema_horizon_start),
        steps(config.ema_horizon_end), steps(config.ema_ramp),
        max(1, round(steps(config.eval_every))), max(1, round(steps(config.checkpoint_every))),
    )  # fmt: skip


def _hold_out(
    train: Source, test: Source | None, config: PretrainConfig
) -> tuple[Source, Source | None]:
    """(images to train on, images to measure on)."""
    if config.holdout == 0:
        return train, None
    if test is not None:
        return train, hold_out(test, min(config.holdout, len(test)), config.seed)[1]
    count = min(config.holdout, len(train) // 10)
    return hold_out(train, count, config.seed) if count else (train, None)


def _batch_size(config: PretrainConfig) -> int:
    assert config.batch_size is not None, "the config is not resolved"
    return config.batch_size


def _cut(batch: Batch, parts: int) -> list[Batch]:
    size = len(batch.images) // parts
    return [
        Batch(images, indices, [])
        for images, indices in zip(batch.images.split(size), batch.indices.split(size), strict=True)
    ]


def _due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total

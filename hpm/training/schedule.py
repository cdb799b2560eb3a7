"""The schedule of a run: durations in steps, and default values that depend on data and machine."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch

from hpm.core.choices import TIMM, PatchSize
from hpm.core.config import PretrainConfig, secondary_mask_ratio
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.precision import auto_precision
from hpm.core.wording import file_word
from hpm.models.architecture import resolve_model
from hpm.training.optim import constant_learning_rate, ema_decay, learning_rate

PAPER_BASE_LR, PAPER_STEPS = 1.5e-4, 100_000
HIGHEST_PEAK_LR = 2e-3
# Of runs that start from other weights and have a new decoder. Their base rate is that of a run
# from random weights: lower ones were no better (benchmarks/continued.py). Layer decay lowers the
# encoder's.
CONTINUED_FREEZE, CONTINUED_LAYER_DECAY = "10%", 0.75


@dataclass(frozen=True)
class Schedule:
    """All durations in steps. Every scheduled value is a pure function of the step."""

    total: int
    steps_per_epoch: int
    warmup: float
    peak_lr: float
    ema_horizon_start: float
    ema_horizon_end: float
    ema_ramp: float
    evaluate_every: int
    probe_every: int
    checkpoint_every: int
    hard_share_by: Literal["step", "epoch"]
    cooldown: float | None = None  # None: half a cosine
    start: int = 0  # first step of the present warm-up: of a prolonged run, where it had ended
    freeze: int = 0  # steps for which the encoder is frozen

    @property
    def epochs(self) -> float:
        return self.total / self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """0-based epoch of a 0-based step."""
        return step // self.steps_per_epoch

    def hard_share_progress(self, step: int) -> float:
        """Progress of training in (0, 1] at a 0-based step, for the hard share: counted in steps,
        or in whole epochs as in the paper."""
        if self.hard_share_by == "epoch":
            return min(1.0, (self.epoch(step) + 1) / self.epochs)
        return (step + 1) / self.total

    def learning_rate(self, step: int) -> float:
        if self.cooldown is not None:
            return constant_learning_rate(
                step, self.total, self.warmup, self.cooldown, self.peak_lr
            )
        step, total = step - self.start, self.total - self.start
        return learning_rate(step, total, self.warmup, self.peak_lr)

    def encoder_share(self, step: int) -> float:
        """Learning rate of the encoder as a share of that of the decoders: 0 while it is frozen,
        then rising linearly to 1, as long as the warm-up takes. 1 in a run that is prolonged."""
        if step < self.freeze:
            return 0.0
        if self.freeze == 0 or self.warmup == 0 or self.start:
            return 1.0
        return min(1.0, (step - self.freeze + 1) / self.warmup)

    @property
    def cooldown_start(self) -> int | None:
        """Steps before the cooldown; None for half a cosine."""
        return None if self.cooldown is None else max(0, self.total - math.ceil(self.cooldown))

    def ema_decay(self, step: int) -> float:
        return ema_decay(step, self.ema_horizon_start, self.ema_horizon_end, self.ema_ramp)

    def evaluates(self, steps_done: int) -> bool:
        return steps_done % self.evaluate_every == 0 or steps_done == self.total

    def probes(self, steps_done: int) -> bool:
        return steps_done % self.probe_every == 0 or steps_done == self.total

    def saves(self, steps_done: int) -> bool:
        if steps_done == self.cooldown_start:
            return True
        return steps_done % self.checkpoint_every == 0 or steps_done == self.total


def make_schedule(
    config: PretrainConfig, num_images: int | None, start: int = 0, freeze: int | None = None
) -> Schedule:
    """The schedule of a resolved config for `num_images` training images, None for a stream.

    Args:
        start: of a prolonged run, the step at which it had ended. It warms up again, for at most
            half of the added steps.
        freeze: of a resumed run, the steps for which its encoder is frozen, which do not change
            when it is prolonged. Default: those of the config.
    """
    per_epoch = steps_per_epoch(config, config.global_batch_size, num_images)
    total = num_steps(config.steps, config.epochs, per_epoch)

    def steps(text: str) -> float:
        return duration_steps(text, total, per_epoch)

    if freeze is None:
        freeze = round(steps(config.freeze_encoder or "0%"))
    added = total - start
    warmup = duration_steps(config.warmup, added, per_epoch)
    if start:
        # A warm-up in steps or epochs fits the first length. The cosine has to reach 0 again.
        warmup = min(warmup, added / 2)
    return Schedule(
        total=total,
        steps_per_epoch=per_epoch,
        warmup=warmup,
        peak_lr=config.peak_lr,
        ema_horizon_start=steps(config.ema_horizon_start),
        ema_horizon_end=steps(config.ema_horizon_end),
        ema_ramp=steps(config.ema_ramp),
        evaluate_every=max(1, round(steps(config.eval_every))),
        probe_every=max(1, round(steps(config.probe_every))),
        checkpoint_every=max(1, round(steps(config.checkpoint_every))),
        hard_share_by=config.hard_share_by,
        cooldown=steps(config.cooldown) if config.schedule == "constant" else None,
        start=start,
        freeze=freeze,
    )


def num_steps(steps: int | None, epochs: int, steps_per_epoch: int) -> int:
    """Length of training in steps, which `steps` or `epochs` gives."""
    return steps or epochs * steps_per_epoch


def steps_per_epoch(config: PretrainConfig, batch_size: int, num_images: int | None) -> int:
    """Length of an epoch in steps. Of a stream (None) it is not known: all of its training counts
    as one."""
    if num_images is None:
        assert config.steps is not None, "a stream needs a number of steps"
        return config.steps
    return num_images // batch_size


def default_base_lr(steps: int, batch_size: int) -> float:
    """Default base learning rate: larger for shorter training.

    1.5e-4 x (100,000 / steps)^0.75, but at least the paper's 1.5e-4, and with the peak (base x
    batch / 256) at most the highest that was measured (docs/recipes.md).
    """
    by_steps = PAPER_BASE_LR * (PAPER_STEPS / steps) ** 0.75
    base_lr = max(PAPER_BASE_LR, min(by_steps, HIGHEST_PEAK_LR * 256 / batch_size))
    return float(f"{base_lr:.2g}")


def resolve(
    config: PretrainConfig,
    num_images: int | None,
    device: torch.device,
    world_size: int,
    continued: bool = False,
) -> PretrainConfig:
    """Replace None and `auto` by their values for this data, model and machine.

    Args:
        num_images: None for a stream.
        continued: the run starts from other weights and has a new decoder.

    Raises UserError if the batch size does not fit, or if the encoder is frozen throughout.
    """
    architecture = resolve_model(config)
    share = config.accumulate * world_size * config.repeat_augment
    most = 256 if num_images is None else min(256, num_images)
    batch_size = config.batch_size or most // share * share
    if num_images is not None and not 0 < batch_size <= num_images:
        kind = file_word(config.frames > 1)
        raise UserError(
            f"a batch of {batch_size or share} needs more than {counted(num_images, kind)} to "
            "train on: pass a smaller --batch-size"
        )
    if batch_size % share or not batch_size:
        raise UserError(
            f"batch_size {batch_size} cannot be shared by "
            f"{counted(world_size, 'process', 'processes')}, "
            f"accumulate {config.accumulate} and repeat_augment {config.repeat_augment}: pass a "
            f"multiple of {share}"
        )
    per_epoch = steps_per_epoch(config, batch_size, num_images)
    total = num_steps(config.steps, config.epochs, per_epoch)
    base_lr = config.base_lr
    if base_lr is None:
        base_lr = default_base_lr(total, batch_size)
    freeze, layer_decay = config.freeze_encoder, config.layer_decay
    if freeze is None:
        freeze = CONTINUED_FREEZE if continued else "0%"
    if round(duration_steps(freeze, total, per_epoch)) >= total:
        raise UserError(
            f"freeze_encoder {freeze} leaves no step of {total} that trains the encoder: pass a "
            "shorter one"
        )
    if layer_decay is None:
        layer_decay = CONTINUED_LAYER_DECAY if continued else 1.0
    precision = config.precision
    if precision == "auto":
        precision = auto_precision(device)
    normalize = config.normalize
    if normalize == "auto":
        normalize = "timm" if config.pretrained and _has_timm_channels(config) else "measured"
    return dataclasses.replace(
        config,
        patch_size=cast(PatchSize, architecture.patch_size),
        hard_share_start=config.hard_shares[0],
        hard_share_end=config.hard_shares[1],
        secondary_mask_ratio=secondary_mask_ratio(config),
        decoder_dim=architecture.need_decoders().decoder_dim,
        decoder_depth=architecture.need_decoders().decoder_depth,
        decoder_heads=architecture.need_decoders().decoder_heads,
        batch_size=batch_size,
        base_lr=base_lr,
        freeze_encoder=freeze,
        layer_decay=layer_decay,
        precision=precision,
        normalize=normalize,
    )


def _has_timm_channels(config: PretrainConfig) -> bool:
    from hpm.models.timm_models import timm_input

    return timm_input(config.model.removeprefix(TIMM)).channels == config.channels

"""Refuse what cannot work before anything is loaded: one clear line each."""

from __future__ import annotations

import math
from typing import Any

from hpm.config import (
    AttentiveConfig,
    EvalConfig,
    KnnConfig,
    LabelledEvalConfig,
    LinearConfig,
    PretrainConfig,
    resolve_model,
)
from hpm.errors import UserError
from hpm.schedule import duration_steps

COUNTS = (
    "epochs", "steps", "batch_size", "accumulate", "log_every", "keep_checkpoints", "decoder_dim",
    "decoder_depth", "decoder_heads",
)  # fmt: skip
NOT_NEGATIVE = (
    "holdout", "workers", "seed", "base_lr", "weight_decay", "predictor_weight", "clip_grad",
)  # fmt: skip
SHARES = ("hard_share_start", "hard_share_end", "max_unreadable")
DURATIONS = (
    "warmup", "ema_horizon_start", "ema_horizon_end", "ema_ramp", "eval_every", "checkpoint_every",
    "probe_every",
)  # fmt: skip
MOST_CHANNELS = 32


def check_pretrain(config: PretrainConfig) -> None:
    """Raises UserError for the first option that cannot work, alone or with another."""
    if not 1 <= config.channels <= MOST_CHANNELS:
        raise UserError(f"channels is {config.channels}; it must lie between 1 and {MOST_CHANNELS}")
    architecture = resolve_model(config)
    _check_sizes(architecture)
    _check_mask(config, architecture)
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{name} is {value}; it must not be negative")
    for name in SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must lie between 0 and 1")
    for name in DURATIONS:
        try:
            duration_steps(getattr(config, name), 100, 10)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if config.batch_size and config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate {config.accumulate} does not divide batch_size {config.batch_size}"
        )
    low, high = config.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"crop_scale is [{low}, {high}]; it must rise between 0 and 1")
    if config.normalize == "imagenet" and config.channels != 3:
        raise UserError(
            f"normalize imagenet has 3 channels, but channels is {config.channels}: "
            "pass --normalize measured"
        )


def _check_sizes(architecture: dict[str, Any]) -> None:
    sizes = zip(architecture["image_size"], architecture["patch_size"], strict=True)
    for image, patch in sizes:
        if patch < 1 or image < 1:
            raise UserError("image_size and patch_size must be at least 1 pixel")
        if patch > image:
            raise UserError(
                f"image_size {image} is smaller than patch_size {patch}: pass smaller patches"
            )
        if image % patch:
            fitting = max(1, round(image / patch)) * patch
            raise UserError(
                f"patch_size {patch} does not divide image_size {image}: "
                f"the nearest that fits is --image-size {fitting}"
            )
    for dim, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
        width, number = architecture[dim], architecture[heads]
        if number < 1 or width % max(number, 1) or width % 4:
            raise UserError(f"{dim} {width} must be a multiple of 4 and of {heads} {number}")


def _check_mask(config: PretrainConfig, architecture: dict[str, Any]) -> None:
    if not 0 < config.mask_ratio < 1:
        raise UserError(f"mask_ratio is {config.mask_ratio}; it must lie between 0 and 1")
    sizes = zip(architecture["image_size"], architecture["patch_size"], strict=True)
    patches = math.prod(image // patch for image, patch in sizes)
    visible = int(patches * (1 - config.mask_ratio))
    if visible in (0, patches):
        lacking, mend = ("visible", "smaller") if visible == 0 else ("hidden", "larger")
        raise UserError(
            f"mask_ratio {config.mask_ratio} leaves no {lacking} patch of {patches}: "
            f"pass a {mend} --mask-ratio, or smaller patches"
        )
    if config.mask == "easy_to_hard" and config.predictor_loss == "none":
        raise UserError(
            "mask easy_to_hard needs a loss predictor, but predictor_loss is none: "
            "pass --mask random for plain MAE"
        )


def check_eval(config: EvalConfig) -> None:
    """Raises UserError for the first option of an evaluation that cannot work.

    Fine-tuning has more, which need the backbone: see `evals/finetune.py`.
    """
    for name in ("batch_size", "images", "epochs", "cache_gb"):
        if getattr(config, name, 1) <= 0:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("workers", "seed"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"{name} is {value}; it must not be negative")
    if isinstance(config, LabelledEvalConfig) and not 0 < config.train_share <= 1:
        raise UserError(f"train_share is {config.train_share}; it must be above 0 and at most 1")
    if isinstance(config, KnnConfig) and (config.temperature <= 0 or min(config.k, default=0) < 1):
        raise UserError("temperature and every k must be positive")
    if isinstance(config, (LinearConfig, AttentiveConfig)):
        if not config.lr or min(config.lr) <= 0:
            raise UserError("lr needs one number or more, all of them positive")
        if not config.weight_decay or min(config.weight_decay) < 0:
            raise UserError("weight_decay needs one number or more, none of them negative")
        if config.probe_batch_size < 2:
            raise UserError(f"probe_batch_size is {config.probe_batch_size}; it must be at least 2")
    crop_scale = getattr(config, "crop_scale", (1.0, 1.0))
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"crop_scale is {list(crop_scale)}; it must rise between 0 and 1")

"""Check the options of a pre-training before anything is loaded."""

from __future__ import annotations

import dataclasses
import math

from hpm.core.choices import HARD_SHARES, TIMM
from hpm.core.config import PretrainConfig
from hpm.core.durations import duration_steps, seconds
from hpm.core.errors import UserError, counted
from hpm.core.options import check_rules, describe
from hpm.mining.miner import tubes_of
from hpm.mining.strategies import BUILT_IN, check_strategy, find_mask
from hpm.mining.teacher import small_image_size
from hpm.mining.units import unit_grid
from hpm.models.architecture import SIZES, Architecture, check_sizes, resolve_model
from hpm.models.encoder import Encoder
from hpm.models.own_encoder import find_encoder
from hpm.targets.registry import check_target, find_target
from hpm.training.trackers import check_tracker

MINED_BY_LOSS = tuple(mask for mask in HARD_SHARES if mask != "attention")


def check_pretrain(config: PretrainConfig) -> None:
    """Raise UserError for the first invalid option or combination of options."""
    check_rules(config)
    _check_model(config)
    architecture = resolve_model(config)
    _check_decoder(config)
    _check_sizes(architecture)
    _check_mask(config, architecture)
    check_target(config)
    if config.batch_size and config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate {config.accumulate} does not divide batch_size {config.batch_size}"
        )
    if config.batch_size and config.batch_size % config.repeat_augment:
        raise UserError(
            f"repeat_augment {config.repeat_augment} does not divide batch_size "
            f"{config.batch_size}: pass a multiple of it as --batch-size"
        )
    if config.normalize == "imagenet" and config.channels != 3:
        raise UserError(
            f"normalize imagenet has 3 channels, but channels is {config.channels}: "
            "pass --normalize measured"
        )
    if config.normalize == "timm":
        _check_timm_input(config)
    if config.probe and config.frames > 1:
        raise UserError("probe takes images, but this run is of clips: leave it out")
    if config.schedule == "cosine" and config.cooldown != PretrainConfig.cooldown:
        raise UserError(
            f"cooldown is {config.cooldown}, but schedule is cosine: pass --schedule constant, or "
            "leave it out"
        )
    _check_shard(config)
    check_tracker(config.tracker)
    if config.stop_after:
        seconds(config.stop_after)


def _check_shard(config: PretrainConfig) -> None:
    if not config.shard:
        if config.shard_within != "all":
            raise UserError(f"shard_within is {config.shard_within}: pass --shard as well")
        return
    if config.compile == "true":
        raise UserError("compile is true, but sharded models are not compiled: leave it out")
    if config.teacher_scale != 1:
        raise UserError(
            f"teacher_scale is {config.teacher_scale}, but a sharded teacher has one size: leave "
            "it or --shard out"
        )


def _check_model(config: PretrainConfig) -> None:
    """Check --pretrained and --init. `resolve_model` checks the model's name."""
    _check_positions(config)
    freeze = config.freeze_encoder
    given = config.init or config.pretrained
    if freeze is not None and not given and duration_steps(freeze, 100, 1) > 0:
        raise UserError(
            f"freeze_encoder is {freeze}, but the encoder starts from random weights: leave it "
            f"out, or pass --init, or --model {TIMM}NAME --pretrained"
        )
    for option in ("init_partial", "init_teacher"):
        if getattr(config, option) and not config.init:
            raise UserError(
                f"{option} is true, but init is not given: pass --init, or leave it out"
            )
    if not config.pretrained:
        return
    if not config.model.startswith(TIMM):
        raise UserError(
            f"pretrained: there are no pretrained weights for {config.model}; pass --model "
            f"{TIMM}NAME"
        )
    if config.init:
        raise UserError("pretrained and init both set the first weights: pass one of them")
    from hpm.models.timm_models import check_weights

    check_weights(config.model.removeprefix(TIMM))


def _check_positions(config: PretrainConfig) -> None:
    """Only our own encoders have these options; others come with what they have."""
    for option in ("positions", "class_token", "class_tokens"):
        value, default = getattr(config, option), describe(PretrainConfig)[option].default
        if value != default and config.model not in SIZES:
            raise UserError(
                f"{option} is {value}, but model is {config.model}: leave it out, or pass --model "
                "vit_small"
            )
    if config.class_tokens > 1 and not config.class_token:
        raise UserError(
            f"class_tokens is {config.class_tokens}, but class_token is false: leave one of them "
            "out"
        )


def _check_timm_input(config: PretrainConfig) -> None:
    if not config.model.startswith(TIMM):
        raise UserError(
            f"normalize timm needs a model of timm, but model is {config.model}: pass --normalize "
            f"imagenet or measured, or --model {TIMM}NAME"
        )
    from hpm.models.timm_models import timm_input

    channels = timm_input(config.model.removeprefix(TIMM)).channels
    if config.channels != channels:
        raise UserError(
            f"normalize timm has {counted(channels, 'channel')}, but channels is "
            f"{config.channels}: pass --normalize measured"
        )


def _check_decoder(config: PretrainConfig) -> None:
    depth = config.decoder_depth  # of a resolved config, that of the deep one
    if config.decoder == "deep" and depth is not None:
        standard = dataclasses.replace(config, decoder_depth=None)
        if depth != resolve_model(standard).need_decoders().decoder_depth:
            raise UserError(f"decoder is deep, but decoder_depth is {depth}: leave one of them out")


def _check_sizes(architecture: Architecture) -> None:
    check_sizes(architecture.image_size, architecture.patch_size)
    widths = [("decoder_dim", "decoder_heads"), ("predictor_dim", "predictor_heads")]
    if architecture.model is None:  # others have been built already
        widths.insert(0, ("embed_dim", "num_heads"))
    numbers = architecture.to_json()
    for dim, heads in widths:
        width, number = numbers[dim], numbers[heads]
        if number < 1 or width % max(number, 1) or width % 4:
            raise UserError(f"{dim} {width} must be a multiple of 4 and of {heads} {number}")


def sizes_of(architecture: Architecture) -> list[tuple[int, int]]:
    """(size of the image, size of a patch) in pixels along each axis."""
    return list(zip(architecture.image_size, architecture.patch_size, strict=True))


def _has_attention(model: str) -> bool:
    """Whether an encoder returns its attention."""
    if model in SIZES or model.startswith(TIMM):
        return model in SIZES
    return find_encoder(model).with_attention is not Encoder.with_attention


def _check_mask(config: PretrainConfig, architecture: Architecture) -> None:
    grid = tuple(image // patch for image, patch in sizes_of(architecture))
    patches = math.prod(grid)
    _check_tubes(config)
    if tubes_of(config) != "none":
        grid = grid[1:]  # the places, which are hidden at all times
        patches = math.prod(grid)
    if config.mask not in BUILT_IN:
        find_mask(config.mask)
    visible = int(patches * (1 - config.mask_ratio))
    if visible in (0, patches):
        missing, remedy = ("visible", "smaller") if visible == 0 else ("hidden", "larger")
        raise UserError(
            f"mask_ratio {config.mask_ratio} leaves no {missing} patch of {patches}: "
            f"pass a {remedy} --mask-ratio, or smaller patches"
        )
    by_teacher = not config.mines_by_memory
    if config.mask in MINED_BY_LOSS and config.predictor_loss == "none" and by_teacher:
        raise UserError(
            f"mask {config.mask} needs a loss predictor, but predictor_loss is none: "
            "pass --mask random for plain MAE, or --mine-by memory"
        )
    if config.mask == "attention" and not by_teacher:
        raise UserError(
            "mask attention mines by the teacher's attention, but mine_by is "
            f"{config.mine_by}: leave it out"
        )
    if config.mining_temperature and config.mask not in HARD_SHARES:
        raise UserError(
            f"mining_temperature is {config.mining_temperature:g}, but mask {config.mask} mines "
            "nothing: leave it out, or pass --mask easy_to_hard"
        )
    _check_mask_unit(config, grid)
    _check_teacher_pass(config)
    _check_small_teacher(config, architecture)
    if config.mask == "attention" and not config.class_token:
        raise UserError(
            "mask attention needs a class token, but class_token is false: pass another --mask, or "
            "leave --class-token out"
        )
    if config.mask == "attention" and not _has_attention(config.model):
        raise UserError(
            f"mask attention needs the attention of one of our own encoders, but model is "
            f"{config.model}: pass another --mask, or --model vit_small"
        )
    if config.mask == "uniform":
        if any(size // config.mask_unit % 2 for size in grid):
            of_units = "" if config.mask_unit == 1 else f" of units of {config.mask_unit}"
            raise UserError(
                f"mask uniform needs an even grid{of_units}, but image_size and patch_size make "
                f"{' x '.join(map(str, grid))} patches: pass another --image-size"
            )
        number, ratio = ("four", 0.75) if len(grid) == 2 else ("eight", 0.875)
        if config.mask_ratio != ratio:
            raise UserError(
                f"mask uniform leaves one patch of {number}, but mask_ratio is "
                f"{config.mask_ratio}: pass --mask-ratio {ratio}, or another --mask"
            )
    if config.mask not in BUILT_IN:
        units = unit_grid(grid, config.mask_unit)
        check_strategy(config.mask, units, -(-(patches - visible) // config.mask_unit ** len(grid)))


def _check_tubes(config: PretrainConfig) -> None:
    if config.mine_tubes == "none":
        return
    if config.frames == 1:
        raise UserError(
            f"mine_tubes is {config.mine_tubes}, but frames is 1: pass --frames, or leave it out"
        )
    if config.mask not in HARD_SHARES:
        raise UserError(
            f"mine_tubes is {config.mine_tubes}, but mask {config.mask} mines nothing: leave it "
            "out, or pass --mask easy_to_hard"
        )


def _check_mask_unit(config: PretrainConfig, grid: tuple[int, ...]) -> None:
    unit, shape = config.mask_unit, " x ".join(map(str, grid))
    if any(size % unit for size in grid):
        raise UserError(
            f"mask_unit {unit} does not divide the {shape} patches that image_size and patch_size "
            "make: pass another --mask-unit or --image-size"
        )
    if unit > 1 and all(size == unit for size in grid):
        raise UserError(
            f"mask_unit {unit} makes one unit of all {shape} patches: pass a smaller one"
        )


def _check_teacher_pass(config: PretrainConfig) -> None:
    """Masks by a memory need no pass of the teacher, and its attention is that of whole images."""
    if config.mine_every > 1 and config.mines_by_memory:
        raise UserError(
            f"mine_every is {config.mine_every}, but mine_by is {config.mine_by}: pass "
            "--mine-every 1, or --mine-by teacher"
        )
    if config.teacher_view == "masked" and config.mines_by_memory:
        raise UserError(
            f"teacher_view is masked, but mine_by is {config.mine_by}: pass --teacher-view full, "
            "or --mine-by teacher"
        )
    if config.teacher_view == "masked" and config.mask == "attention":
        raise UserError(
            "teacher_view is masked, but mask is attention: pass --teacher-view full, or another "
            "--mask"
        )


def _check_small_teacher(config: PretrainConfig, architecture: Architecture) -> None:
    scale = config.teacher_scale
    if scale == 1:
        return
    reasons = {
        f"mine_by is {config.mine_by}": config.mines_by_memory,
        "mask is attention": config.mask == "attention",
        "teacher_view is masked": config.teacher_view == "masked",
        f"target is {config.target}, which needs features of whole images": find_target(
            config.target
        ).needs_teacher,
        f"model is {config.model}": "hiera" in config.model,
        f"positions is {config.positions}": config.positions == "sincos_1d",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"teacher_scale is {scale}, but {reason}: leave it out")
    size = architecture.image_size
    if small_image_size(size, architecture.patch_size, scale) == size:
        rows, columns = (image // patch for image, patch in sizes_of(architecture)[-2:])
        raise UserError(
            f"teacher_scale {scale} leaves the {rows} x {columns} patches as they are: pass a "
            "smaller one"
        )

"""The first lines that a session logs: what is trained, and warnings about its options."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import counted
from hpm.core.wording import file_word
from hpm.training.schedule import Schedule, steps_per_epoch

if TYPE_CHECKING:  # fine-tunings do not need it
    from hpm.training.run import PretrainingRun

FEW_STEPS = 2000
FEW_IMAGES = 10
FEW_FOR_RANDOM_WEIGHTS = 100_000
MADE_TO_BE_SHORT = ("demo", "demo-video")  # data


def introduce(run: PretrainingRun, notes: list[str], resumed: bool) -> None:
    """Log the first lines of a session."""
    config, total, count = run.config, run.schedule.total, run.images.count
    lines = [_introduction(run)]
    lines += [] if resumed else few_steps(config, total, count)
    lines += few_images(count, run.images.kind) or (
        [] if resumed else few_for_random_weights(config, count)
    )
    lines += [] if resumed else continued_training(config, run.schedule)
    lines += long_warmup(config.warmup, run.schedule.warmup, total - run.schedule.start)
    lines += notes
    for line in lines:
        run.log.info(line)


def _introduction(run: PretrainingRun) -> str:
    config, images = run.config, run.images
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    held_out = len(images.held_out) if images.held_out else 0
    fewer = ""
    if held_out < config.holdout:
        fewer = f" (--holdout is {config.holdout}, "
        fewer += (
            "but the split has no more)" if images.has_split else "but at most a tenth is held out)"
        )
    epochs = "" if images.count is None else f"({run.schedule.epochs:.3g} epochs), "
    memory = run.memory.nbytes / 1e6 if run.memory else 0
    return (
        f"{config.model} ({parameters / 1e6:.1f} M parameters with decoders), "
        f"{images.described()}, {held_out} held out"
        f"{fewer}, {counted(run.schedule.total, 'step')} of "
        f"{counted(config.global_batch_size, run.sample)}{' ' if epochs else ', '}"
        f"{epochs}base lr {config.base_lr:g}, {run.device}, "
        f"{config.precision}, "
        f"{counted(distributed.world_size(), 'process', 'processes')}, into {config.out}"
        + (f", memory of hardness {memory:.3g} MB" if memory else "")
        + _sharding(run)
    )


def _sharding(run: PretrainingRun) -> str:
    if not run.config.shard:
        return ""
    if not run.sharded:
        return ", not sharded: there is one process"
    within = "each node" if run.config.shard_within == "node" else "all processes"
    return f", sharded over {within}"


def few_steps(config: PretrainConfig, total: int, num_images: int | None) -> list[str]:
    """A warning for the log if training is short."""
    if total >= FEW_STEPS or config.data in MADE_TO_BE_SHORT:
        return []
    per_epoch = steps_per_epoch(config, config.global_batch_size, num_images)
    more = f"--epochs {math.ceil(FEW_STEPS / per_epoch)}, or a smaller --batch-size"
    if config.max_hours is not None:
        more = "a larger --max-hours, or a smaller model or --batch-size"
    elif config.steps:
        more = f"--steps {FEW_STEPS}"
    return [
        f"warning: {counted(total, 'step')} is a short training: useful features take about "
        f"{FEW_STEPS:,} or more; pass {more}"
    ]


def few_images(num_images: int | None, kind: str = "image") -> list[str]:
    """A warning for the log if there are very few training images. kind: their name."""
    if num_images is None or num_images >= FEW_IMAGES:
        return []
    are = "is" if num_images == 1 else "are"
    return [
        f"warning: there {are} {counted(num_images, kind)} to train on: a backbone needs "
        "hundreds at least"
    ]


def few_for_random_weights(config: PretrainConfig, num_images: int | None) -> list[str]:
    """A warning for the log if a run starts from random weights on few images."""
    given = config.init or config.pretrained
    demo = config.data in MADE_TO_BE_SHORT
    if num_images is None or num_images >= FEW_FOR_RANDOM_WEIGHTS or given or demo:
        return []
    start = "--init WEIGHTS" if config.frames > 1 else "--init WEIGHTS or --model timm/NAME"
    start += "" if config.frames > 1 else " --pretrained"
    kind = file_word(config.frames > 1)
    return [
        f"warning: {counted(num_images, kind)} to train on from random weights: with fewer than "
        f"{FEW_FOR_RANDOM_WEIGHTS:,}, continue from pretrained weights instead ({start})"
    ]


def continued_training(config: PretrainConfig, schedule: Schedule) -> list[str]:
    """A line for the log if the encoder is trained otherwise than the decoders."""
    parts = []
    if schedule.freeze:
        parts.append(f"frozen for {counted(schedule.freeze, 'step')} (--freeze-encoder)")
    if config.layer_decay != 1:
        factor = f"{config.layer_decay:g}"
        parts.append(f"learning rate times {factor} from block to block below (--layer-decay)")
    return [f"encoder: {', '.join(parts)}"] if parts else []


def long_warmup(text: str, warmup: float, total: int) -> list[str]:
    """A warning for the log if the warm-up takes the whole training."""
    if warmup < total:
        return []
    return [
        f"warning: the warm-up of {text} takes {warmup:.0f} steps, but the training has {total}: "
        "the learning rate never reaches its peak; pass a shorter --warmup"
    ]

"""Build a pre-training from its config: images, options, folder, models, optimiser, log.

Each step takes the results of the previous ones, which fixes their order.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpm.core import distributed
from hpm.core.choices import HARD_SHARES, TIMM
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.data.fingerprint import fingerprint
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD
from hpm.data.sources import Source, Splits, hold_out, open_data
from hpm.data.statistics import measure_statistics
from hpm.data.streams.shards import names_archives
from hpm.data.unreadable import UnreadableImages
from hpm.data.video.sources import holds_videos
from hpm.mining.memory import HardnessMemory
from hpm.mining.miner import make_miner
from hpm.mining.teacher import Teacher
from hpm.models.architecture import Architecture, resolve_model
from hpm.models.build import build_empty_model, build_model
from hpm.models.hiera import HieraEncoder
from hpm.models.mim import MaskedImageModel
from hpm.models.timm_encoder import TimmEncoder, pretrained_weights
from hpm.models.timm_models import timm_input
from hpm.targets.registry import make_target
from hpm.training.compiling import compile_part, compiles, describe_uncompiled
from hpm.training.first_lines import introduce
from hpm.training.images import TrainingImages
from hpm.training.log import RunLog
from hpm.training.optim import adamw
from hpm.training.resume import claim, length_of
from hpm.training.run import PretrainingRun
from hpm.training.schedule import (
    make_schedule,
    num_steps,
    resolve,
    steps_per_epoch,
)
from hpm.training.streams import begin_reading, open_stream_images
from hpm.weights.checkpoint import (
    Checkpoint,
    load_checkpoint,
    open_checkpoint,
    restore,
    restore_sharded,
)
from hpm.weights.initialise import initialise, lacks_decoder
from hpm.weights.run_folder import RunFolder

if TYPE_CHECKING:
    from hpm.weights.shard_writer import ShardWriter


def build_run(
    config: PretrainConfig,
    device: torch.device,
    quiet: bool = False,
    statistics: tuple[list[float], list[float]] | None = None,
) -> PretrainingRun:
    """Build a run, restored from the latest checkpoint of its folder if there is one.

    quiet: log nothing, for runs that only time their steps.
    statistics: mean and standard deviation of each channel (default: as `normalize` says).
    Raises UserError if the folder, the data or the weights do not fit the config.
    """
    images = open_images(config)
    files = RunFolder(Path(config.out))
    given_options, config = config, settle(config, images, files, device)
    checkpoint, notes = claim_folder(files, given_options, config, images)
    schedule = make_schedule(
        config,
        images.count,
        warm_up_start(config, images, checkpoint),
        checkpoint.meta.get("freeze", 0) if checkpoint else None,
    )
    architecture = resolve_model(config)
    if checkpoint:
        mean, std = checkpoint.meta["mean"], checkpoint.meta["std"]
    else:
        mean, std = statistics or channel_statistics(config, images.source, architecture)
    target = make_target(config, architecture, mean, std, device)
    architecture = architecture.with_target_dim(target.dim)

    sharded = is_sharded(config)
    given = bool(config.init or config.pretrained) and not checkpoint
    if sharded and not given:
        model = build_empty_model(architecture, config.seed)
    else:
        model = build_model(architecture, config.seed).to("cpu" if sharded else device)
    if given:
        notes += first_weights(config, model)
    teacher = Teacher(model)
    if sharded:
        from hpm.training.parallel import shard  # takes a second to import

        shard(model, teacher.model, config, device, draw=not checkpoint and not given)
    memory = make_memory(config, images.source, model, device)
    assert config.layer_decay is not None, "the config is resolved"
    optimizer = adamw(
        model,
        config.peak_lr,
        config.betas,
        config.weight_decay,
        config.layer_decay,
        freezes=schedule.freeze > 0,
    )
    if checkpoint:
        (restore_sharded if sharded else restore)(
            checkpoint, model, teacher.model, optimizer, memory
        )

    compiled = not sharded and compiles(config, device)
    notes += [] if sharded else describe_uncompiled(config, device)
    for part in (model.encoder, model.reconstructor, model.predictor):
        if part is not None:
            part.checkpoint_activations = config.checkpoint_activations
    # Only the training step, whose shapes never change, uses the compiled functions. Figures,
    # measures and probes have other shapes, which would trigger recompilation.
    student = model if sharded else distributed.data_parallel(compile_part(model, compiled))
    eager_miner = make_miner(config, architecture, teacher.model, memory, target.needs_teacher)
    predict_loss = compile_part(eager_miner.model.predict_loss, compiled)
    miner = dataclasses.replace(eager_miner, predict_loss=predict_loss)

    meta: dict[str, Any] = checkpoint.meta if checkpoint else {}
    step = meta.get("step", 0)
    reading, lines = begin_reading(config, images, meta.get("stream"))
    notes += lines
    known = map(int, meta.get("unreadable", ()))  # older versions: texts, with reasons
    unreadable = UnreadableImages(images.names, config.max_unreadable, known)
    run = PretrainingRun(
        config=config,
        schedule=schedule,
        architecture=architecture,
        images=images,
        files=files,
        device=device,
        mean=mean,
        std=std,
        model=model,
        teacher=teacher,
        target=target,
        memory=memory,
        optimizer=optimizer,
        student=student,
        miner=miner,
        eager_miner=eager_miner,
        log=RunLog(files.folder, step, schedule.total, distributed.is_main() and not quiet, config),
        unreadable=unreadable,
        writer=_shard_writer() if sharded else None,
        step=step,
        best_probe=meta.get("best_probe", {}),
        probe_seconds=meta.get("probe_seconds", 0.0),
        seconds_before=meta.get("seconds", 0.0),
        reading=reading,
    )
    if reading is not None:
        unreadable.count = run.images_read
    if checkpoint:
        notes.append(f"resuming from {checkpoint.path}, step {step}")
    if step and step == schedule.start < schedule.total:
        notes.append(
            f"prolonged to {schedule.total} steps, with another warm-up "
            f"({schedule.warmup:.0f} of the {schedule.total - step} added steps) and cosine"
        )
    introduce(run, notes, resumed=checkpoint is not None)
    return run


def open_images(config: PretrainConfig) -> TrainingImages:
    """Open the data, and hold out images for evaluation."""
    opened = partial(open_data, config.data, clips=config.frames > 1, in_order=config.stream)
    # A thousand processes would each ask a server for the list of shards, and for their headers.
    is_stream = config.stream or names_archives(config.data)
    splits = distributed.main_first(opened) if is_stream else opened()
    if not isinstance(splits, Splits):
        return open_stream_images(config, splits)
    train, held_out = splits.train, None
    if config.cache == "true" and holds_videos(train):
        raise UserError(
            f"cache true keeps decoded images in memory, but {config.data} holds videos: leave it "
            "out"
        )
    if config.holdout > 0 and splits.test is not None:
        count = min(config.holdout, len(splits.test))
        held_out = hold_out(splits.test, count, config.seed)[1]
    elif config.holdout > 0 and (count := min(config.holdout, len(splits.train) // 10)):
        train, held_out = hold_out(splits.train, count, config.seed)
    found = distributed.main_first(lambda: fingerprint(splits.train))
    return TrainingImages(train, held_out, splits.test is not None, found)


def settle(
    config: PretrainConfig, images: TrainingImages, files: RunFolder, device: torch.device
) -> PretrainConfig:
    """Resolve the options that depend on data, first weights and machine. A resumed run keeps
    what these were when it began."""
    kept = distributed.main_first(files.kept_options)
    unset = {name: value for name, value in kept.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **unset)
    continued = not kept and distributed.main_first(lambda: continues(config))
    return resolve(config, images.count, device, distributed.world_size(), continued)


def continues(config: PretrainConfig) -> bool:
    """Whether a run starts from other weights that lack a decoder of its model."""
    if not config.init:
        return config.pretrained
    return lacks_decoder(resolve_model(config), config.init, config.init_teacher)


def claim_folder(
    files: RunFolder, given: PretrainConfig, config: PretrainConfig, images: TrainingImages
) -> tuple[Checkpoint | None, list[str]]:
    """Lock the folder. Returns (its latest checkpoint, lines for the log).

    given: the options as the user set them. config: the same, resolved.
    """
    count, found = images.count, images.fingerprint
    note = distributed.main_first(lambda: claim(files, given, config, count, found))
    latest = distributed.from_main(files.latest_checkpoint())
    load = open_checkpoint if is_sharded(config) else load_checkpoint
    return load(latest) if latest else None, [note] if note else []


def is_sharded(config: PretrainConfig) -> bool:
    """Whether the models are sharded: with one process, there is nothing to share."""
    return config.shard and distributed.world_size() > 1


def _shard_writer() -> ShardWriter:
    from hpm.weights.shard_writer import ShardWriter  # takes a second to import

    return ShardWriter()


def warm_up_start(
    config: PretrainConfig, images: TrainingImages, checkpoint: Checkpoint | None
) -> int:
    """The step from which the schedule warms up: 0, or where a run had ended that is prolonged."""
    if checkpoint is None or config.schedule == "constant":
        return 0
    per_epoch = steps_per_epoch(config, config.global_batch_size, images.count)
    ended = length_of(checkpoint.meta["config"], per_epoch)
    total = num_steps(config.steps, config.epochs, per_epoch)
    if checkpoint.meta["step"] == ended < total:
        return ended
    return checkpoint.meta.get("schedule_start", 0)


def channel_statistics(
    config: PretrainConfig, source: Source, architecture: Architecture
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on a scale of 0 to 1."""
    if config.normalize == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    if config.normalize == "timm":
        trained_on = timm_input(config.model.removeprefix(TIMM))
        return trained_on.mean, trained_on.std
    height, width = architecture.image_size[-2:]
    min_side = min(architecture.patch_size[-2:])
    size = height, width
    # A thousand processes would ask one file system for the same images.
    return distributed.main_first(
        lambda: measure_statistics(source, size, config.channels, config.seed, min_side)
    )


def first_weights(config: PretrainConfig, model: MaskedImageModel) -> list[str]:
    """Load the weights of --init or --pretrained. Returns lines for the log."""
    if config.init:
        return [initialise(model, config.init, config.init_partial, config.init_teacher)]
    if config.pretrained:
        _load_pretrained(model)
        return [f"pretrained: the encoder has timm's weights of {config.model}"]
    return []


def _load_pretrained(model: MaskedImageModel) -> None:
    """Load timm's weights. One process downloads them for all."""
    encoder = model.encoder
    assert isinstance(encoder, (TimmEncoder, HieraEncoder))

    def load() -> None:
        encoder.load_state_dict(pretrained_weights(encoder))

    distributed.main_first(load)
    if not distributed.is_main():
        load()


def make_memory(
    config: PretrainConfig, source: Source, model: MaskedImageModel, device: torch.device
) -> HardnessMemory | None:
    """A memory of losses or predictions, if the options need one."""
    if config.mask not in HARD_SHARES or (config.mine_by, config.mine_every) == ("teacher", 1):
        return None
    progress = config.mine_by == "progress"
    return HardnessMemory(len(source), model.encoder.grid, device, progress)

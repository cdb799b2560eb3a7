"""`hpm plan`: look at the images and at the machine, and suggest a command that pre-trains on
them."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpm.commands.gpus import GPUS, Gpu
from hpm.commands.multiply_adds import step_multiply_adds
from hpm.commands.options import PlanConfig
from hpm.commands.plan_memory import estimate_memory
from hpm.commands.plan_rules import (
    ENOUGH,
    EPOCHS,
    FRAMES,
    STREAM_STEPS,
    Setting,
    candidates,
    largest,
    recommended_epochs,
    training_images,
)
from hpm.commands.plan_words import Plan
from hpm.commands.timing import matrix_product_flops
from hpm.core.distributed import pick_device
from hpm.core.errors import UserError, counted
from hpm.core.precision import computes_in_bfloat16
from hpm.core.progress import say, track
from hpm.core.signals import stop_signals
from hpm.data.cache import available_memory
from hpm.data.sources import Source, Splits, open_data
from hpm.data.streams.head import first_images
from hpm.data.survey import Survey, survey
from hpm.data.video.sampling import ClipSampling
from hpm.data.video.sources import holds_videos
from hpm.data.workers import num_workers, usable_cores
from hpm.models.architecture import resolve_model
from hpm.pretraining import training_parts
from hpm.training.checks import check_pretrain
from hpm.training.length import RESERVE
from hpm.training.log import memory_gb
from hpm.training.pace import Pace, steps_within
from hpm.training.schedule import default_base_lr
from hpm.training.trial import Timed, time_parts

DAY = 24.0  # hours that a training may take if nothing else is said
SEARCHED = 20  # times as many images are searched for copies as are decoded
TIMING = 400.0  # seconds of a training, of which timing takes a small share
ROUNDS = 2  # of choosing a setting and timing it
# Assumptions about a device that has not been timed.
SHARE_OF_PRODUCT, SHARE_OF_PEAK = 0.5, 0.3  # of a matrix product, and of a GPU's peak
STARTUP = 90.0  # seconds, most of them of compilation
SAVED_BYTES = {True: 3.0, False: 4.0}  # of a saved number: in bfloat16, some are float32
FULL = 0.85  # of the memory, which the estimate may fill
PARTS = (1, 2, 4, 8, 16, 32, 64)  # of a batch
VIEW_SIZE = (224, 224)  # that images are decoded at to see whether they can be read
UNUSED = "unused"  # the run folder of a config that is not run


@dataclass(frozen=True)
class Target:
    """What is planned for: a device of this machine, or a GPU that is not here (`gpu`)."""

    title: str
    device: torch.device
    gpu: Gpu | None
    flops: float  # that training is assumed to reach, until it is timed
    memory: float  # bytes

    @property
    def on_gpu(self) -> bool:
        return self.gpu is not None or self.device.type != "cpu"

    @property
    def in_bfloat16(self) -> bool:
        return self.gpu is not None or computes_in_bfloat16(self.device)


def plan(config: PlanConfig) -> Plan:
    """Look at images and machine, and choose a training. Raises UserError on bad input."""
    source, count, frames = _open(config)
    sampling = ClipSampling(frames, 4) if frames > 1 else None
    search = SEARCHED * config.look_at
    found = survey(source, config.look_at, search, VIEW_SIZE, sampling, track)
    found.count = count
    if not found.widths or len(found.unreadable) == found.looked_at:
        name, reason = found.unreadable[0]
        raise UserError(f"{config.data}: none of the images can be read ({name}: {reason})")
    target = _target(config)
    return _suggested(config, found, _choose(config, found, frames, target), target)


def _open(config: PlanConfig) -> tuple[Source, int | None, int]:
    """(training images, their number, frames per clip)."""
    wanted = config.frames
    splits = open_data(config.data, clips=wanted is not None and wanted > 1)
    if not isinstance(splits, Splits):
        return first_images(splits, config.look_at), None, 1
    train = splits.train
    frames = wanted or (FRAMES if holds_videos(train) else 1)
    return train, len(train), frames


def _target(config: PlanConfig) -> Target:
    if config.gpu is not None:
        gpu = GPUS[config.gpu]
        flops = SHARE_OF_PEAK * gpu.peak * 1e12
        return Target(f"one {gpu.title}", torch.device("cpu"), gpu, flops, gpu.memory * 1e9)
    device = pick_device(config.device)
    flops = SHARE_OF_PRODUCT * matrix_product_flops(device)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Target(f"one {about.name}", device, None, flops, about.total_memory)
    if device.type == "mps":
        memory = torch.mps.recommended_max_memory()
        return Target("the Apple GPU of this machine", device, None, flops, memory)
    title = f"this machine, {counted(usable_cores(), 'core')}, no GPU"
    return Target(title, device, None, flops, available_memory())


@dataclass(frozen=True)
class Choice:
    """A setting, how long its training takes, and the steps that are recommended for it."""

    setting: Setting
    timed: Timed
    recommended: int
    memory_gb: float = 0.0

    def reaches(self, share: float, hours: float) -> bool:
        """Whether the time is enough for a share of the recommended steps."""
        steps = math.ceil(share * self.recommended)
        return self.timed.seconds(steps) <= (1 - RESERVE) * 3600 * hours


def _choose(config: PlanConfig, found: Survey, frames: int, target: Target) -> Choice:
    """The largest setting that gets enough steps in the time, timed if the device is here; the
    smallest one if none does."""
    hours, flops = config.hours or DAY, target.flops
    operations: dict[Setting, float] = {}
    measured: Choice | None = None
    tried: set[Setting] = set()
    while True:
        for setting in candidates(largest(found, frames)):
            if setting not in operations:
                operations[setting] = _operations(setting, config.data)
            choice = _estimated(setting, operations[setting] / flops, found, config.data, target)
            if choice.reaches(ENOUGH, hours):
                break
        if measured and choice.setting in tried:
            return measured
        choice = _with_memory(choice, target)
        if target.gpu is not None:
            return choice
        tried.add(setting)
        measured = _measured(choice, config.data, target)
        if measured.reaches(ENOUGH, hours) or len(tried) == ROUNDS:
            return measured
        flops = operations[setting] / measured.timed.pace.step


def _operations(setting: Setting, data: str) -> float:
    """Floating-point operations of a step."""
    config = setting.config(data, UNUSED)
    return 2 * setting.batch_size * step_multiply_adds(resolve_model(config), config)


def _estimated(
    setting: Setting, step_seconds: float, found: Survey, data: str, target: Target
) -> Choice:
    count = training_images(found)
    if count is None:
        length: dict[str, Any] = {"steps": STREAM_STEPS}
    else:
        length = {"epochs": recommended_epochs(count, setting.batch_size, setting.frames)}
    config = setting.config(data, UNUSED, base_lr=0.0, **length)
    timed = Timed(Pace(STARTUP if target.on_gpu else 0.0, step_seconds), config, count)
    return Choice(setting, timed, timed.length)


def _with_memory(choice: Choice, target: Target) -> Choice:
    """The same in so many parts of a batch that each fits into memory."""
    setting, config = choice.setting, choice.timed.config
    memory = estimate_memory(resolve_model(config), config, SAVED_BYTES[target.in_bfloat16])
    batch, room = setting.batch_size, FULL * target.memory
    possible = [parts for parts in PARTS if batch % parts == 0]
    parts = next((p for p in possible if memory.total(batch // p) <= room), possible[-1])
    setting = dataclasses.replace(setting, accumulate=parts)
    return dataclasses.replace(
        choice, setting=setting, memory_gb=memory.total(batch // parts) / 1e9
    )


def _measured(choice: Choice, data: str, target: Target) -> Choice:
    """The same, timed; in smaller parts if the GPU's memory is full."""
    setting, length = choice.setting, choice.timed.config
    say(f"timing {setting.model} at {setting.image_size} px, batch {setting.batch_size}")
    with tempfile.TemporaryDirectory() as folder, stop_signals() as stop:
        while True:
            out = str(Path(folder) / "run")
            config = setting.config(data, out, epochs=length.epochs, steps=length.steps)
            check_pretrain(config)
            try:
                timed = time_parts(config, target.device, training_parts(None), stop, TIMING)
            except torch.cuda.OutOfMemoryError:
                if setting.batch_size % (2 * setting.accumulate):
                    raise
                setting = dataclasses.replace(setting, accumulate=2 * setting.accumulate)
                continue
            return Choice(setting, timed, timed.length, memory_gb(target.device))


def _suggested(config: PlanConfig, found: Survey, choice: Choice, target: Target) -> Plan:
    """The command, its length, and what is to be said of it."""
    setting, timed, hours = choice.setting, choice.timed, config.hours or DAY
    limit = (1 - RESERVE) * 3600 * hours
    fitting = max(1, steps_within(limit, timed.pace, timed.schedule_of))
    if fitting < choice.recommended:
        length: dict[str, Any] = {"max_hours": hours}
        steps = fitting
    elif timed.images is None:
        length, steps = {"steps": choice.recommended}, choice.recommended
    else:
        per_epoch = choice.recommended // timed.config.epochs
        epochs = timed.config.epochs
        if config.hours is not None:  # a longer training is a better one
            epochs = max(epochs, min(EPOCHS[1], fitting // per_epoch))
        length, steps = {"epochs": epochs}, epochs * per_epoch
    out = config.out or f"runs/{run_name(config.data)}"
    options = setting.options() | length
    check_pretrain(setting.config(config.data, out, **length))
    count = timed.images
    return Plan(
        survey=found,
        setting=setting,
        command=command_of(config.data, out, options),
        steps=steps,
        epochs=None if count is None else steps / max(1, count // setting.batch_size),
        recommended=choice.recommended,
        base_lr=default_base_lr(steps, setting.batch_size),
        seconds=timed.seconds(steps),
        step_seconds=timed.pace.step,
        memory_gb=choice.memory_gb,
        memory_available_gb=target.memory / 1e9,
        machine=target.title,
        on_gpu=target.on_gpu,
        estimated=target.gpu is not None,
        workers=num_workers(None),
        hours=config.hours,
        max_hours=length.get("max_hours"),
    )


def command_of(data: str, out: str, options: dict[str, Any]) -> list[str]:
    """The words of a command of `hpm pretrain`."""
    words = ["hpm", "pretrain", data, "--out", out]
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def run_name(data: str) -> str:
    """The last part of the data's name, in characters that no shell treats specially."""
    stem = re.split(r"[/\\:]", data.rstrip("/"))[-1].split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "first"

"""Fit the length of a training to --max-hours."""

from __future__ import annotations

import dataclasses
import time

import torch

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.durations import time_text
from hpm.core.errors import UserError, counted
from hpm.core.progress import say
from hpm.core.signals import Stop
from hpm.training.pace import steps_within
from hpm.training.resume import begun_within
from hpm.training.trial import Parts, time_parts

RESERVE = 0.03  # of --max-hours, for steps that take longer than those that were timed


def fit_to_time(
    config: PretrainConfig, device: torch.device, parts: Parts, stop: Stop, began: float
) -> tuple[PretrainConfig, list[str]]:
    """The config with the number of steps that fits into --max-hours, and lines for the log.

    The number is fixed when a run begins; from then on the run is one of --steps. All processes
    call it. began: when this command did, by `time.monotonic`. Raises UserError if nothing fits.
    """
    if config.max_hours is None or config.steps is not None:
        return config, []
    hours, limit = config.max_hours, 3600 * config.max_hours
    if begun := distributed.main_first(lambda: begun_within(config)):
        used = f"{time_text(begun.seconds)} of --max-hours {hours:g} were used before"
        note = f"{used}; the {counted(begun.steps, 'step')} that were fixed then are kept"
        return dataclasses.replace(config, steps=begun.steps), [note]
    say(f"--max-hours {hours:g}: timing some steps first")
    timed = time_parts(config, device, parts, stop, limit)
    left = (1 - RESERVE) * limit - (time.monotonic() - began)
    steps = distributed.from_main(steps_within(left, timed.pace, timed.schedule_of))
    described = timed.pace.described()
    if steps == 0:
        raise UserError(f"max_hours is {hours:g}, but {described}: pass more, or --steps instead")
    note = f"--max-hours {hours:g}: {counted(steps, 'step')}, because {described}"
    return dataclasses.replace(config, steps=steps), [note]

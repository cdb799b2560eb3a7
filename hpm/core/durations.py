"""Durations: `40 epochs`, `500 steps` or `5%` of the training, and times such as `1h30m`."""

from __future__ import annotations

import re

from hpm.core.errors import UserError

TIME = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(epochs?|steps?|%)\s*")


def duration_steps(text: str, total_steps: int, steps_per_epoch: int) -> float:
    """Convert a duration to steps. Raises UserError if the text is not a duration."""
    match = DURATION.fullmatch(str(text))
    if match is None:
        raise UserError(f"'{text}' is not a duration: write '40 epochs', '500 steps' or '5%'")
    value, unit = float(match[1]), match[2].rstrip("s")
    return value * {"epoch": steps_per_epoch, "step": 1, "%": total_steps / 100}[unit]


def seconds(text: str) -> int:
    """Convert a time to seconds. Raises UserError if the text is not a time."""
    match = TIME.fullmatch(str(text).replace(" ", ""))
    if match is None:
        raise UserError(f"'{text}' is not a time: write '4h', '90m' or '1d12h'")
    days, hours, minutes, rest = (int(number or 0) for number in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def time_text(duration: float) -> str:
    """Seconds in words: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if duration < 60:
        return f"{duration:.0f} s"
    minutes = round(duration / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def check_duration(name: str, text: str, is_interval: bool = False) -> None:
    """Raise UserError, with the option's name, if the text is not a duration.

    is_interval: 0 is refused, because it might mean always or never.
    """
    try:
        steps = duration_steps(text, 1, 1)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if is_interval and steps == 0:
        raise UserError(f"{name} is {text}; pass '1 step' for every step, or 100% for the end only")

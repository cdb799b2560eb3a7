"""Durations: `40 epochs`, `500 steps` or `5%` of the training."""

from __future__ import annotations

import re

from hpm.core.errors import UserError

DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(epochs?|steps?|%)\s*")


def duration_steps(text: str, total_steps: int, steps_per_epoch: int) -> float:
    """Convert a duration to steps. Raises UserError if the text is not a duration."""
    match = DURATION.fullmatch(str(text))
    if match is None:
        raise UserError(f"'{text}' is not a duration: write '40 epochs', '500 steps' or '5%'")
    value, unit = float(match[1]), match[2].rstrip("s")
    return value * {"epoch": steps_per_epoch, "step": 1, "%": total_steps / 100}[unit]


def check_duration(name: str, text: str) -> None:
    """Raise UserError, with the option's name, if the text is not a duration."""
    try:
        duration_steps(text, 1, 1)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None

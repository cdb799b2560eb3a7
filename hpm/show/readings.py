"""Read what a run logged; of a long run, what its curves show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpm.training.sessions import read_lines

MAX_LINES = 10_000  # of a log of which all are kept
GROUPS = 400  # of a longer one; more than a curve has bins
SPEED = "images_per_second"  # logged by training, not by evaluations

Line = dict[str, Any]
# (seconds of training up to a line, for one image per step; the line)
Timed = tuple[float, Line]


def read_metrics(folder: Path) -> list[Line]:
    """The lines of metrics.jsonl, each of which has a step.

    Of a log of more than MAX_LINES, only those of evaluations, the latest, and those with the
    lowest or highest value of a metric among their neighbours. Their speed is then the mean since
    the line kept before, so that `training_minutes` stays the same.
    """
    file = folder / "metrics.jsonl"
    lines = (line for line in read_lines(file) if isinstance(line.get("step"), int))
    count = _count_lines(file)
    if count <= MAX_LINES:
        return list(lines)
    kept: list[Timed] = []
    latest: list[Timed] = []
    timed, size = _timed(lines), count // GROUPS
    while group := list(itertools.islice(timed, size)):
        if len(group) == size:
            kept += _telling(latest)
            latest = group
        else:  # the rest, which may be a single evaluation
            latest += group
    return list(_with_mean_speeds([*kept, *latest]))


def _count_lines(file: Path) -> int:
    if not file.exists():
        return 0
    with open(file, "rb") as opened:
        return sum(1 for _ in opened)


def _timed(lines: Iterable[Line]) -> Iterator[Timed]:
    seconds, step = 0.0, 0
    for line in lines:
        if SPEED in line:
            seconds += (line["step"] - step) / line[SPEED]
            step = line["step"]
        yield seconds, line


def _telling(group: list[Timed]) -> Iterator[Timed]:
    """Evaluations, and the lines with the lowest and highest value of each metric."""
    lines = [line for _, line in group]
    places = {place for place, line in enumerate(lines) if SPEED not in line}
    for name in {name for line in lines for name in line}:
        values = {place: line[name] for place, line in enumerate(lines) if _is_finite(line, name)}
        places |= {extreme(values, key=values.__getitem__) for extreme in (min, max) if values}
    return (group[place] for place in sorted(places))


def _is_finite(line: Line, name: str) -> bool:
    value = line.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _with_mean_speeds(timed: Iterable[Timed]) -> Iterator[Line]:
    last_seconds, last_step = 0.0, 0
    for seconds, line in timed:
        if SPEED in line and seconds > last_seconds:
            speed = (line["step"] - last_step) / (seconds - last_seconds)
            last_seconds, last_step = seconds, line["step"]
            line = line | {SPEED: speed}
        yield line

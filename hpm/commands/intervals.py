"""Paired differences over seeds, with their 95 % t-interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Quantiles 0.975 and 0.8 of Student's t with 1, 2, ... degrees of freedom. The last stands for all
# further ones, which makes intervals a little wider than they are.
# fmt: off
T_975: tuple[float, ...] = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)
T_800: tuple[float, ...] = (
    1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879,
    0.876, 0.873, 0.870, 0.868, 0.866, 0.865, 0.863, 0.862, 0.861, 0.860,
)
# fmt: on
ROUNDING = 1e-9  # equal differences of accuracies in percent vary by less


@dataclass(frozen=True)
class Interval:
    """A mean difference over some pairs.

    half: of the 95 % t-interval. visible: a difference that would have been told from zero with a
    probability of about 80 %, at the spread of these pairs. Both are None of a single pair, and 0
    of pairs that are all alike, whose spread is not known.
    """

    mean: float
    half: float | None
    visible: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below zero, else 0. Always 0 without a spread."""
        if not self.half or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def interval(differences: Sequence[float]) -> Interval | None:
    """The interval of some differences; None without any."""
    count = len(differences)
    if count == 0:
        return None
    mean = statistics.mean(differences)
    if count == 1:
        return Interval(mean, None, None)
    if max(differences) - min(differences) < ROUNDING:
        return Interval(mean, 0.0, 0.0)
    error = statistics.stdev(differences) / count**0.5
    free = min(count - 1, len(T_975)) - 1
    return Interval(mean, T_975[free] * error, (T_975[free] + T_800[free]) * error)

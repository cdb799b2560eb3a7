"""How long a training takes, and how many steps of it fit into a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpm.core.durations import time_text
from hpm.training.schedule import Schedule


@dataclass(frozen=True)
class Pace:
    """Seconds that the parts of a training take.

    startup: from the beginning to the first step, with compilation. step: of an optimiser step,
    with loading its images; of images that are kept in memory, once they are there. first_visit:
    what a step takes longer in the first epoch, which reads and decodes them. evaluation, probe,
    save: of one of each, with its figures and the report.
    """

    startup: float
    step: float
    first_visit: float = 0.0
    evaluation: float = 0.0
    probe: float = 0.0
    save: float = 0.0

    def seconds(self, schedule: Schedule) -> float:
        """Of a whole training. Before the first step, the held-out images are drawn."""
        total = schedule.total
        return (
            self.startup
            + self.step * total
            + self.first_visit * min(total, schedule.steps_per_epoch)
            + self.evaluation * (1 + _times(schedule.evaluate_every, total))
            + self.probe * _times(schedule.probe_every, total)
            + self.save * _times(schedule.checkpoint_every, total)
        )

    def training(self) -> Pace:
        """Of the steps alone."""
        return Pace(0.0, self.step, self.first_visit)

    def described(self) -> str:
        """`a step takes 0.312 s, an evaluation 4.2 s`, and what else takes time."""
        parts = [f"a step takes {self.step:.3g} s"]
        parts += [
            f"{name} {seconds:.2g} s"
            for name, seconds in (
                ("an evaluation", self.evaluation),
                ("a probe", self.probe),
                ("a checkpoint", self.save),
            )
            if seconds >= 0.1
        ]
        return f"{', '.join(parts)}, and getting ready {time_text(self.startup)}"


def steps_within(seconds: float, pace: Pace, schedule_of: Callable[[int], Schedule]) -> int:
    """The largest number of steps whose training takes at most so many seconds; 0 if none does.

    schedule_of: the schedule of a number of steps.
    """
    low, high = 0, max(0, round(seconds / pace.step))
    while low < high:
        middle = (low + high + 1) // 2
        if pace.seconds(schedule_of(middle)) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def _times(every: int, total: int) -> int:
    """How often something is due that happens every so many steps, and after the last one."""
    return -(-total // every)

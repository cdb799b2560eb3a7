"""How far a run is: its state, and the time that it took and needs."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpm.core import lock
from hpm.core.durations import time_text
from hpm.training.sessions import TIME, Session
from hpm.weights.run_folder import training_minutes

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """The state of a run.

    step, total: steps done, and of the whole training (None if unknown).
    elapsed: seconds of all sessions.
    left: seconds to the end at the pace of this session; None unless it runs and has done steps.
    """

    state: State
    step: int
    total: int | None
    elapsed: float
    left: float | None = None

    @property
    def steps(self) -> str:
        """Such as `step 40 of 1,000`."""
        return f"step {self.step:,}" + (f" of {self.total:,}" if self.total else "")

    @property
    def words(self) -> str:
        """Such as `step 40 of 1,000, running`."""
        return f"{self.steps}, {self.state}"

    @property
    def times(self) -> str:
        """Time elapsed and left; empty if unknown."""
        words = f"{time_text(self.elapsed)} so far" if self.state == "running" else ""
        if self.elapsed and not words:
            words = f"took {time_text(self.elapsed)}"
        return words + (f", about {time_text(self.left)} left" if self.left is not None else "")


def read_status(
    folder: Path,
    options: dict[str, Any],
    metrics: list[dict[str, Any]],
    sessions: Sequence[Session],
    now: float | None = None,
) -> Status:
    """The state of the run in a folder, from its options, metrics and sessions.

    now: seconds since the epoch (default: the present).
    """
    now = time.time() if now is None else now
    step = max((line["step"] for line in metrics), default=0)
    last = sessions[-1] if sessions else None
    total = last.total_steps if last else options.get("steps")
    if last and last.last_step is not None:
        step = last.last_step
    state = _state(folder, step, total, last)
    ends = [*[session.first_step for session in sessions[1:]], step]
    elapsed = 0.0
    in_order = sorted(metrics, key=_step)  # a search, not a pass, for each of many sessions
    for session, end in zip(sessions, ends, strict=False):
        running = state == "running" and session is last
        if running or session.ended:
            end_time = now if running else _seconds(session.ended, now)
            elapsed += max(0.0, end_time - _seconds(session.began, now))
        else:  # killed: what its readings tell
            first, behind = (
                bisect_right(in_order, at, key=_step) for at in (session.first_step, end)
            )
            own = in_order[first:behind]
            batch = options.get("batch_size") or 0
            elapsed += 60 * training_minutes(own, batch, session.first_step)
    left = None
    if last and total and state == "running" and step > last.first_step:
        pace = (now - _seconds(last.began, now)) / (step - last.first_step)
        left = max(0.0, pace * (total - step))
    return Status(state, step, total, elapsed, left)


def _step(line: dict[str, Any]) -> int:
    return line["step"]


def _state(folder: Path, step: int, total: int | None, last: Session | None) -> State:
    if last and last.failed:
        return "failed"
    if step and step == total:
        return "finished"
    running = last is not None and last.reason is None and lock.may_be_held(folder)
    return "running" if running else "stopped"


def _seconds(text: str | None, now: float) -> float:
    """Seconds since the epoch of a time in a session; now, if it is not one."""
    try:
        return time.mktime(time.strptime(text or "", TIME))
    except ValueError:  # written by another version
        return now

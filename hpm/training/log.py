"""Log a run: progress bar, train.log, metrics.jsonl, TensorBoard and a tracker."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hpm.core.config import PretrainConfig
from hpm.core.durations import time_text
from hpm.core.errors import one_line
from hpm.core.files import write_text
from hpm.core.progress import text_console
from hpm.training.trackers import Tracker, start_tracker

# Called after each log entry instead of printing it: (step, status, seconds left).
Watcher = Callable[[int, str, float], None]
PLAIN_LINES = 50  # lines of progress over a run, if stderr is not a terminal


class TrainingProgress(Progress):
    """A bar with step and time, and the latest numbers on a second line to fit 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class RunLog:
    """Logs to the run folder, the terminal and, with a config, to its tracker.

    Inactive except in the main process. Errors of logging are reported once and never stop
    training.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        total_steps: int,
        active: bool,
        config: PretrainConfig | None = None,
    ):
        self.folder = folder
        self.active = active
        self.total_steps = total_steps
        self.console = text_console()
        self.watcher: Watcher | None = None
        self._last_line = -1
        self._last_step = start_step
        self._failed: set[str] = set()
        self._logged_once: set[str] = set()
        self._tracker: Tracker | None = None
        self._tensorboard: Any = None
        self._progress: Progress | None = None
        if not active:
            return
        with self.never_fail("logging"):
            _forget_after(folder / "metrics.jsonl", start_step)
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder), purge_step=start_step or None)
        self._tracking = f"tracking by {config.tracker}" if config else ""
        if config and start_step < total_steps:
            options = json.loads(json.dumps(dataclasses.asdict(config)))
            with self.never_fail(self._tracking):
                self._tracker = start_tracker(config.tracker, folder, options, start_step > 0)
        if self.console.is_terminal:
            self._progress = TrainingProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task(
                "training", total=total_steps, completed=start_step, status=""
            )
            self._progress.start()

    def close(self) -> None:
        """Stop the progress bar and close all files."""
        if self._progress:
            self._progress.stop()
        with self.never_fail("logging"):  # what TensorBoard has not written, on a full disk
            if self._tensorboard:
                self._tensorboard.close()
        self._track(lambda tracker: tracker.close(self._last_step >= self.total_steps))

    def info(self, text: str) -> None:
        """Log a line to the terminal and to train.log."""
        if not self.active:
            return
        self.console.print(text)
        self._to_file(text)

    def _to_file(self, text: str) -> None:
        with (
            self.never_fail("logging"),
            open(self.folder / "train.log", "a", encoding="utf-8") as file,
        ):
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def info_once(self, text: str) -> None:
        """Like `info`, but logs each line only once."""
        if text not in self._logged_once:
            self._logged_once.add(text)
            self.info(text)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log numbers to metrics.jsonl, TensorBoard and the tracker."""
        if not self.active:
            return
        self._last_step = step
        with self.never_fail("logging"):
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            for name, value in values.items():
                if self._tensorboard:
                    self._tensorboard.add_scalar(name, value, step)
        self._track(lambda tracker: tracker.metrics(step, values))

    def figure(self, step: int, path: Path) -> None:
        """Log a figure to the tracker."""
        self._track(lambda tracker: tracker.figure(step, path))

    def progress(self, step: int, status: str, left: float) -> None:
        """Update the bar; without a terminal, print a line now and then. left: seconds to the end,
        at the speed of the last steps."""
        if self._progress:
            self._progress.update(self._task, completed=step, status=status)
        elif self.active:
            line = step * PLAIN_LINES // self.total_steps
            if line != self._last_line:
                self._last_line = line
                text = f"step {step}/{self.total_steps}  {status}  {time_text(left)} left"
                self._to_file(text) if self.watcher else self.info(text)
        if self.watcher is not None:
            with self.never_fail("the live display"):
                self.watcher(step, status, left)

    @contextlib.contextmanager
    def never_fail(self, what: str) -> Iterator[None]:
        """Turn any error in the block into a warning, once for each `what`."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                text = one_line(error)
                with contextlib.suppress(OSError):
                    self.info(f"warning: {what} failed ({text})")

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """Call the tracker, and drop it if it fails: it has already retried, and every further
        failure would delay training as long."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self.never_fail(self._tracking):
                call(tracker)
                self._tracker = tracker


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: on the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":  # now, since no peak is kept
        return torch.mps.driver_allocated_memory() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss includes the peak of the parent process
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(peak) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _forget_after(path: Path, step: int) -> None:
    """Drop lines that an interrupted run logged after the checkpoint that it resumes from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))

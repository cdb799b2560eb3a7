"""A live display of a training in a notebook: progress, curves and held-out pictures.

Each is an output of the cell that is refreshed in place; no widget and no script is needed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from hpm.core.durations import time_text
from hpm.core.notebook import CellOutput, in_notebook
from hpm.core.wording import of_clips, sample_word
from hpm.show.drawing import Drawing, drawing
from hpm.show.moments import latest_moment
from hpm.show.plots import plot_metrics
from hpm.show.readings import read_metrics
from hpm.show.report import read_options
from hpm.training.log import RunLog
from hpm.weights.run_folder import RunFolder

IMAGES = 4
PROGRESS_EVERY = 0.5  # seconds
CURVES_EVERY = 3.0  # seconds at least, and
DRAWING_SHARE = 0.03  # of the time at most


@contextlib.contextmanager
def live_display(folder: Path, log: RunLog, step: int) -> Iterator[None]:
    """Show a training in this cell while the context is open; does nothing outside a notebook."""
    if not (log.active and in_notebook()):
        yield
        return
    with log.never_fail("the live display"):
        shown = LiveDisplay(folder, log.total_steps, step)
        log.watcher = shown.update
    try:
        yield
    finally:
        if log.watcher is not None:
            with log.never_fail("the live display"):
                shown.end()
        log.watcher = None


class LiveDisplay:
    """Three outputs of a cell: a line of progress, curves, and held-out pictures."""

    def __init__(self, folder: Path, total_steps: int, step: int):
        self.files = RunFolder(folder)
        self.total_steps, self.step, self.status = total_steps, step, ""
        self.options = read_options(self.files.config_file)
        self.began = self.progress_shown = self.curves_shown = time.monotonic()
        self.drawing_seconds = 0.0  # of the curves, the last time
        self.moment: int | None = None  # step of the pictures
        self.progress, self.curves, self.pictures = CellOutput(), CellOutput(), CellOutput()
        self._show_progress(None)

    def update(self, step: int, status: str, left: float) -> None:
        """Show the latest log entry, unless one was shown a moment ago."""
        self.step, self.status = step, status
        now = time.monotonic()
        if now - self.progress_shown >= PROGRESS_EVERY:
            self.progress_shown = now
            self._show_progress(left)
        if now - self.curves_shown >= max(CURVES_EVERY, self.drawing_seconds / DRAWING_SHARE):
            self._show_figures()

    def end(self) -> None:
        """Show the last state."""
        self._show_progress(None)
        self._show_figures()

    def _show_progress(self, left: float | None) -> None:
        took = time_text(time.monotonic() - self.began)
        words = f"step {self.step:,} of {self.total_steps:,}, {took}"
        words += f", about {time_text(left)} left" if left is not None else ""
        name = str(self.files.folder)
        self.progress.show_bar(name, self.step, self.total_steps, words, self.status)

    def _show_figures(self) -> None:
        start = time.monotonic()
        metrics = read_metrics(self.files.folder)
        if metrics:
            _show_drawing(self.curves, "curves", plot_metrics(metrics, self.options))
        moment = latest_moment(self.files.moments, self.step)
        if moment is not None and moment.step != self.moment:
            self.moment = moment.step
            kind = sample_word(of_clips(self.options))
            title = f"held-out {kind}s at step {moment.step:,}"
            drawn = drawing(moment.picture(IMAGES), title, across=1.2)
            _show_drawing(self.pictures, title, drawn)
        self.curves_shown = time.monotonic()
        self.drawing_seconds = self.curves_shown - start


def _show_drawing(output: CellOutput, words: str, drawn: Drawing) -> None:
    output.show({"text/plain": words, "image/png": drawn.png(palette=True)})

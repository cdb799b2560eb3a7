"""Progress bars and lines for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track

from hpm.core import distributed
from hpm.core.notebook import in_notebook, track_in_cell


def text_console() -> Console:
    """A console for lines of text: on stderr; in a notebook, where that means alarm, on stdout."""
    if in_notebook():
        return Console(
            file=sys.stdout,
            highlight=False,
            soft_wrap=True,
            markup=False,
            force_jupyter=False,
            force_terminal=False,
        )
    return Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False)


def result_console() -> Console:
    """A console for results, on stdout. Brackets in the names of files are not markup."""
    return Console(markup=False)


def say(text: str) -> None:
    """Print a line, in the main process."""
    if distributed.is_main():
        text_console().print(text)


def track(steps: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """Iterate over steps, with a progress bar if the main process has a terminal, or a notebook
    that knows how many there are."""
    if in_notebook():
        count = len(steps) if total is None and isinstance(steps, Sized) else total
        return steps if count is None else track_in_cell(steps, description, count)
    console = Console(file=sys.stderr)
    shown = console.is_terminal and distributed.is_main()
    return rich_track(
        steps, description, total=total, console=console, transient=True, disable=not shown
    )

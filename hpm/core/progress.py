"""Progress bars and lines for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track

from hpm.core import distributed


def say(text: str) -> None:
    """Print a line to stderr, in the main process."""
    if distributed.is_main():
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(text, markup=False)


def track(steps: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """Iterate over steps, with a progress bar if the main process has a terminal."""
    console = Console(file=sys.stderr)
    shown = console.is_terminal and distributed.is_main()
    return rich_track(
        steps, description, total=total, console=console, transient=True, disable=not shown
    )

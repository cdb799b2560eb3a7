"""Outputs of a notebook's cell that are refreshed in place. Nothing is imported outside one."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any, TypeVar

EVERY = 0.5  # seconds between two updates of a bar

Step = TypeVar("Step")


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and getattr(get_shell(), "kernel", None) is not None


class CellOutput:
    """One output of the present cell. Use it in a notebook only."""

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._is_there = False

    def show(self, content: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        """Show content by MIME type, in place of what was shown before."""
        from IPython.display import display

        display(content, metadata=about or {}, raw=True, display_id=self._id, update=self._is_there)
        self._is_there = True

    def show_bar(self, title: str, done: int, total: int, words: str, below: str = "") -> None:
        """Show a bar with a title before it, words behind it, and a line below it."""
        bar = f'<progress value="{done}" max="{total}"></progress>'
        under = f"<br>{escape(below)}" if below else ""
        self.show(
            {
                "text/plain": f"{title}: {words}\n{below}".rstrip(),
                "text/html": f"<b>{escape(title)}</b> {bar} {escape(words)}{under}",
            }
        )


def track_in_cell(steps: Iterable[Step], title: str, total: int) -> Iterator[Step]:
    """Iterate over steps, with a bar that is gone at the end."""
    output, shown = CellOutput(), 0.0
    for done, step in enumerate(steps):
        if time.monotonic() - shown >= EVERY:
            shown = time.monotonic()
            output.show_bar(title, done, total, f"{done:,} of {total:,}")
        yield step
    if shown:
        output.show({"text/plain": ""})

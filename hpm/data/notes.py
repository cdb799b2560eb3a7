"""What is said about the data on stderr, once."""

from __future__ import annotations

import sys

from hpm.core import distributed

_said: set[str] = set()


def say_once(text: str) -> None:
    """A line by the main process, however often the data are opened."""
    if text not in _said:
        _said.add(text)
        if distributed.is_main():
            print(text, file=sys.stderr)

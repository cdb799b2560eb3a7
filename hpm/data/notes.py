"""Messages about the data, each printed once to stderr."""

from __future__ import annotations

import sys

from hpm.core import distributed

_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a line in the main process, once per text."""
    if text not in _said:
        _said.add(text)
        if distributed.is_main():
            print(text, file=sys.stderr)

"""Messages about the data, each printed once to stderr."""

from __future__ import annotations

import sys

from hpm.core import distributed

_said: set[str] = set()


def say_if_some_are_labelled(name: str, labelled: int, images: int) -> None:
    """Say why labels are not used where only some images have one, as is usual before
    pre-training."""
    if 0 < labelled < images:
        say_once(
            f"{name}: {images - labelled:,} of {images:,} images have no label, so the labels of "
            "the others are not used"
        )


def say_once(text: str) -> None:
    """Print a line in the main process, once per text."""
    if text not in _said:
        _said.add(text)
        if distributed.is_main():
            print(text, file=sys.stderr)

"""The exception for errors that the user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """An error in the input. Its text is one line: what is wrong and how to fix it.

    The command line prints the line and exits with code 2; no traceback is shown, nor is one in a
    notebook.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows."""
        return [f"UserError: {self}"]


def one_line(error: BaseException, most: int | None = None) -> str:
    """The message of an error on one line, cut to a length."""
    return " ".join(str(error).split())[:most]


def why(error: OSError) -> str:
    """The reason that the system gives, without number and path: `permission denied`."""
    text = error.strerror or one_line(error)
    return text[:1].lower() + text[1:]


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; pass the plural if it is irregular."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def size_text(size: Sequence[int]) -> str:
    """`16 x 16`"""
    return " x ".join(map(str, size))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as `; did you mean 'mask_ratio'?`, empty if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""

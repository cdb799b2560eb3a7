"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: its text is one line, what is wrong and how to mend it.

    The command line prints the line and exits with code 2; no traceback is shown.
    """


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def why(error: OSError) -> str:
    """What the system says is wrong, without number and path: `permission denied`."""
    text = error.strerror or one_line(error)
    return text[:1].lower() + text[1:]


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; with a plural where it is not made by an s."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as `; did you mean 'mask_ratio'?`, empty where nothing known is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""

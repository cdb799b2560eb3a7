"""Try again what a network file system fails at for a moment."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

WAITS = (0.1, 1.0)  # seconds before the second and third attempt
PASSING = {
    errno.ESTALE,  # the server has been restarted, or the file replaced
    errno.EIO,  # what a soft mount gives when the server does not answer
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
}


def retried(call: Callable[[], Result]) -> Result:
    """The result of a call that may be made again if it raises an error that `may_pass`."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            time.sleep(wait)
    return call()


def may_pass(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is of a file system that may answer again.
    Libraries written in Rust have the number in their text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(said[1])
    return number in PASSING or (error.__cause__ is not None and may_pass(error.__cause__))

"""Open a stream by its name."""

from __future__ import annotations

from pathlib import Path

from hpm.core.errors import UserError
from hpm.data.streams.archives import Archives
from hpm.data.streams.shards import names_archives
from hpm.data.streams.stream import Stream
from hpm.data.streams.transport import is_remote


def open_stream(data: str, trusted: bool = True) -> Stream | None:
    """Open a stream; None if DATA names none.

    trusted: whether the user gave the name. If it comes from a file, no connection is made to a
    server that it names.

    Raises UserError if there are no shards.
    """
    if not names_archives(data) or Path(data).expanduser().is_dir():
        return None
    if is_remote(data) and not trusted:
        raise UserError(f"{data}: pass DATA yourself to read it from a server that a file names")
    return Archives(data)

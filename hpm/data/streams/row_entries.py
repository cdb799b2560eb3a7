"""The image that a cell of a table holds: its bytes, or the path of a file of its data set."""

from __future__ import annotations

from pathlib import Path

from hpm.core.extras import need
from hpm.data.hugging_face import EXTRA
from hpm.data.streams.archives import LARGEST
from hpm.data.streams.stream import Entry


def row_entry(data: bytes | None, path: str | None, remote: str | None) -> Entry:
    """The image of a row, which has its bytes, or else the path of a file.

    remote: beginning of the paths of the data set's files; None if rows cannot have any.
    """
    name = Path(path).name if path else "row"
    if data is None:
        if path is None or not is_own(path, remote):
            return Entry(name, problem="no bytes in this row")
        with need("fsspec", EXTRA, path).open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        return Entry(name, problem=f"more than {LARGEST} bytes")
    return Entry(name, data)


def is_own(path: str, remote: str | None) -> bool:
    """Whether a path is that of a file of a data set, or of one inside a zip or tar file of it, as
    `zip://a.png::hf://...`. Others, which a table may name, are not read: fsspec would open any
    address, and with it those that the file there holds."""
    *inside, file = path.split("::")
    archives = all(part.startswith(("zip://", "tar://")) for part in inside)
    return remote is not None and file.startswith(remote) and archives

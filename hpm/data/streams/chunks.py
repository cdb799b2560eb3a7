"""LitData's optimised folders, read in order: on a disk, a web server or an object store."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

from hpm.core.errors import UserError, counted
from hpm.data.litdata import INDEX, read_index
from hpm.data.litdata_chunks import arrow_table, arrow_value, image_file, stores_arrow
from hpm.data.streams.archives import LARGEST
from hpm.data.streams.stream import Entry
from hpm.data.streams.transport import RestartingFile, is_remote, opened
from hpm.data.tables import pyarrow_library

LARGEST_INDEX = 1 << 28  # bytes
LARGEST_CHUNK = 1 << 32  # bytes, the most that its offsets can name


class Chunks:
    """The chunks of a LitData folder as a stream. Raises UserError if it cannot be read."""

    repeatable = True

    def __init__(self, data: str):
        self.name = data
        root = data.removesuffix(INDEX).rstrip("/")
        self._root = root if is_remote(root) else os.path.expanduser(root)
        with opened(f"{self._root}/{INDEX}") as file:
            text = _read(file, LARGEST_INDEX)
        self.index = read_index(data, text)
        self.shards: Sequence[str] = [f"{self._root}/{chunk}" for chunk in self.index.chunks]

    def read(self, shard: int) -> Iterator[Entry]:
        url, done = self.shards[shard], 0
        with opened(url) as file:
            try:
                for entry in self._entries(file, int(self.index.sizes[shard])):
                    yield entry
                    done += 1
            except (struct.error, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{url}: the chunk is damaged or cut off after {counted(done, 'image')} "
                    f"({error}): write it again, or leave it out"
                ) from None

    def _entries(self, file: RestartingFile, expected: int) -> Iterator[Entry]:
        head = _read(file, 4)
        (count,) = struct.unpack("<I", head)
        if count != expected:
            raise ValueError(f"{count} samples, not {expected}")
        head += _read(file, 4 * (count + 1))
        begins = struct.unpack_from(f"<{count + 1}I", head, 4)
        if stores_arrow(head[:12]):
            yield from self._rows(head + _read(file, LARGEST_CHUNK))
            return
        _skip(file, begins[0] - len(head))
        for number, (begin, end) in enumerate(pairwise(begins)):
            yield self._entry(f"sample {number}", file, end - begin)

    def _rows(self, chunk: bytes) -> Iterator[Entry]:
        """The samples of a chunk that stores them as Arrow, which cannot be read in order."""
        table = arrow_table(pyarrow_library().py_buffer(chunk))
        for number in range(len(table)):
            name = f"sample {number}"
            try:
                yield Entry(name, arrow_value(table, self.index.image, number))
            except ValueError as error:
                yield Entry(name, problem=str(error))

    def _entry(self, name: str, file: RestartingFile, size: int) -> Entry:
        if not 0 <= size <= LARGEST:
            _skip(file, size)
            return Entry(name, problem=f"{size} bytes, more than {LARGEST}")
        sample = _read(file, size)
        if len(sample) < size:
            raise ValueError("unexpected end of data")
        try:
            return Entry(name, image_file(sample, self.index))
        except ValueError as error:
            return Entry(name, problem=str(error))


def _read(file: RestartingFile, size: int) -> bytes:
    """`size` bytes, or all that are left."""
    parts = []
    while size > 0 and (part := file.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _skip(file: RestartingFile, size: int) -> None:
    """Raises ValueError if there are not as many bytes."""
    if size < 0:
        raise ValueError("the offsets do not rise")
    while size > 0:
        part = file.read(min(size, 1 << 20))
        if not part:
            raise ValueError("unexpected end of data")
        size -= len(part)

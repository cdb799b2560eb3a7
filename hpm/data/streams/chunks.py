"""LitData's optimised folders, read in order: on a disk, a web server or an object store."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import BinaryIO

from hpm.core.errors import UserError, counted
from hpm.data.litdata import INDEX, image_file, read_index
from hpm.data.streams.archives import LARGEST
from hpm.data.streams.stream import Entry
from hpm.data.streams.transport import RemoteFile, is_remote, opened

LARGEST_INDEX = 1 << 28  # bytes


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
        url = self.shards[shard]
        done = 0
        with opened(url) as file:
            try:
                (count,) = struct.unpack("<I", _read(file, 4))
                if count != self.index.sizes[shard]:
                    raise EOFError(f"{count} samples, not {self.index.sizes[shard]}")
                head = _read(file, 4 * (count + 1))
                begins = struct.unpack(f"<{count + 1}I", head)
                _skip(file, begins[0] - 4 - len(head))
                for done, (begin, end) in enumerate(pairwise(begins)):
                    yield self._entry(f"sample {done}", file, end - begin)
            except (struct.error, EOFError) as error:
                raise UserError(
                    f"{url}: the chunk is damaged or cut off after {counted(done, 'image')} "
                    f"({error}): write it again, or leave it out"
                ) from None

    def _entry(self, name: str, file: BinaryIO | RemoteFile, size: int) -> Entry:
        if not 0 <= size <= LARGEST:
            _skip(file, size)
            return Entry(name, problem=f"{size} bytes, more than {LARGEST}")
        sample = _read(file, size)
        if len(sample) < size:
            raise EOFError("unexpected end of data")
        try:
            return Entry(name, image_file(sample, self.index))
        except ValueError as error:
            return Entry(name, problem=str(error))


def _read(file: BinaryIO | RemoteFile, size: int) -> bytes:
    """`size` bytes, or all that are left."""
    parts = []
    while size > 0 and (part := file.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _skip(file: BinaryIO | RemoteFile, size: int) -> None:
    """Raises EOFError if there are not as many bytes."""
    if size < 0:
        raise EOFError("the offsets do not rise")
    while size > 0:
        part = file.read(min(size, 1 << 20))
        if not part:
            raise EOFError("unexpected end of data")
        size -= len(part)

"""The first images of a stream, kept in memory as an ordinary source: held-out images, and those
that statistics are measured on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import islice

import numpy as np

from hpm.data.arrays import Opened, UnreadableImage
from hpm.data.inspection import any_deep
from hpm.data.opening import open_image
from hpm.data.streams.stream import Entry, Stream, image_id


class EntrySource:
    """Images of a stream, in memory.

    ids: of each image in the stream (see `image_id`).
    """

    labels: np.ndarray | None = None

    def __init__(self, name: str, entries: Sequence[Entry], ids: Sequence[int]):
        self.classes: list[str] = []
        self.name, self.entries, self.ids = name, entries, ids

    def __len__(self) -> int:
        return len(self.entries)

    def open(self, index: int) -> Opened:
        return open_entry(self.entries[index])

    def read(self, index: int) -> bytes:
        return self.entries[index].data

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        return f"{self.name}: {self.entries[index].name}"


def open_entry(entry: Entry) -> Opened:
    """Raises UnreadableImage."""
    if entry.problem is not None:
        raise UnreadableImage(f"{entry.name}: {entry.problem}")
    try:
        return open_image(io.BytesIO(entry.data))
    except UnreadableImage as error:
        raise UnreadableImage(f"{entry.name}: {error}") from None


def first_images(stream: Stream, count: int) -> EntrySource:
    """The first `count` images of a stream, or all if it has fewer, shard after shard.

    Raises UserError if a shard cannot be read.
    """
    found = (
        (entry, image_id(shard, place))
        for shard in range(len(stream.shards))
        for place, entry in enumerate(stream.read(shard))
    )
    some = list(islice(found, count))
    return EntrySource(stream.name, [entry for entry, _ in some], [index for _, index in some])

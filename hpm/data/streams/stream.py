"""What a stream is: images in shards, each of which is read from its beginning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

INDEX_BITS = 32  # of an image's id: its place in the shard, below the number of the shard


@dataclass(frozen=True)
class Entry:
    """An encoded image of a shard.

    name: for messages. data: the file's bytes. problem: why there are none, of an image that cannot
    be read. Other images of the shard still can.
    """

    name: str
    data: bytes = b""
    problem: str | None = None


@runtime_checkable
class Stream(Protocol):
    """Images that are read in order. It has no number of images and no random access.

    Who reads which shard, the order of shards and images, and resuming follow from this alone; see
    `hpm.data.streams.lanes`. Loading processes share it: it must not change after it is made, and
    must not hold an open connection.
    """

    name: str  # for messages
    shards: Sequence[str]  # their names, in a fixed order
    repeatable: bool
    """Whether a shard that is read again has the same images in the same order. Only then is a run
    resumed at the image where it stopped, and no image of an epoch is missing or seen twice."""

    def read(self, shard: int) -> Iterator[Entry]:
        """The images of a shard, given by its number, from the first to the last.

        Raises UserError if the shard cannot be read, after a bounded number of attempts.
        """
        ...


STREAM_MEMBERS = ("name", "shards", "repeatable", "read")


class StreamNames:
    """The names of a stream's images, for messages."""

    def __init__(self, stream: Stream):
        self.name, self._stream = stream.name, stream

    def path(self, index: int) -> str:
        """The shard of an image, and its place there."""
        return image_name(self._stream, index)


def image_id(shard: int, place: int) -> int:
    """An id of an image, unique in its stream. Ids increase with shard and place."""
    return shard << INDEX_BITS | place


def image_name(stream: Stream, index: int) -> str:
    """The shard of an image, and its place there."""
    shard, place = index >> INDEX_BITS, index & ((1 << INDEX_BITS) - 1)
    return f"{stream.shards[shard]}, image {place}"

"""Share a stream among loading workers, shuffle it, and resume it at an image.

All epochs form one sequence of shards: each epoch is a permutation of them. Lane `l` of `n` reads
every n-th shard of that sequence, beginning with the l-th. So every shard is read once in each
epoch, by one lane, and all lanes read equally many, whether or not `n` divides their number. A lane
goes on with its next shard without regard to the end of an epoch: no image is dropped there.

Within a lane, images are shuffled in blocks of consecutive ones. A block is known by where it
begins, and its order is drawn from seed and beginning. So a lane's progress is three numbers, its
`Cursor`, and going on from there reads again what the block holds, at most from the beginning of
its first shard. In a loading worker, a thread reads the next block while the last one is used, so
that decoding does not wait for a disk or a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, TypeVar

import numpy as np

from hpm.core.errors import UserError
from hpm.data.streams.stream import Entry, Stream, image_id

SHARDS, BLOCKS = 1, 2  # purposes of random numbers
Item = TypeVar("Item")
MOST_EMPTY = 2  # times the number of shards that a lane reads in a row without an image


class Cursor(NamedTuple):
    """Progress of a lane.

    turn: which of the lane's shards the current block begins in. place: of the block's first image
    in that shard. taken: images of the block that have been used.
    """

    turn: int = 0
    place: int = 0
    taken: int = 0


class Read(NamedTuple):
    """An image of a lane: its epoch, its id (see `image_id`), and where it was read."""

    epoch: int
    id: int
    entry: Entry
    turn: int
    place: int


class Lane:
    """Iterator over the images of a lane, without an end.

    Args:
        stream: what is read.
        number: of this lane, below `count`.
        count: number of lanes, at most the number of shards.
        seed: of the order.
        block: number of images that are shuffled with each other. Twice as many are in memory.
        first_index: images of lower ids are left out.
        cursor: where to begin.
        ahead: whether a thread reads the next block. Only for a process that ends without waiting
            for its threads, as loading workers do: a server may keep it waiting.

    Raises UserError if a shard cannot be read, or if no shard has an image.
    """

    def __init__(
        self,
        stream: Stream,
        number: int,
        count: int,
        seed: int,
        block: int,
        first_index: int = 0,
        cursor: Cursor | None = None,
        ahead: bool = False,
    ):
        self.stream, self.number, self.count = stream, number, count
        self.seed, self.block, self.first_index, self.ahead = seed, block, first_index, ahead
        self.cursor = cursor or Cursor()  # after the last image that was returned
        self._images = self._shuffled()
        self._order: tuple[int, np.ndarray] | None = None  # epoch, and its order of shards

    def __iter__(self) -> Iterator[Read]:
        return self

    def __next__(self) -> Read:
        return next(self._images)

    def _shuffled(self) -> Iterator[Read]:
        turn, place, taken = self.cursor
        images = self._in_order(turn, place)
        blocks = iter(lambda: list(islice(images, self.block)), [])
        for block in read_ahead(blocks) if self.ahead else blocks:
            turn, place = block[0].turn, block[0].place
            rng = np.random.default_rng([self.seed, BLOCKS, self._position(turn), place])
            order = rng.permutation(len(block))
            for number in range(taken, len(block)):
                self.cursor = Cursor(turn, place, number + 1)
                yield block[order[number]]
            taken = 0

    def _in_order(self, turn: int, place: int) -> Iterator[Read]:
        """The images of the lane's shards, from a place in one of them."""
        empty = 0
        while True:
            epoch, shard = self.shard(turn)
            empty += 1
            for number, entry in enumerate(self.stream.read(shard)):
                index = image_id(shard, number)
                if number < place or index < self.first_index:
                    continue
                empty = 0
                yield Read(epoch, index, entry, turn, number)
            if empty > MOST_EMPTY * len(self.stream.shards):
                raise UserError(f"{self.stream.name}: no image is left in its shards")
            turn, place = turn + 1, 0

    def shard(self, turn: int) -> tuple[int, int]:
        """(epoch, number of the shard) of a turn of this lane."""
        epoch, position = divmod(self._position(turn), len(self.stream.shards))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, SHARDS, epoch])
            self._order = epoch, rng.permutation(len(self.stream.shards))
        return epoch, int(self._order[1][position])

    def _position(self, turn: int) -> int:
        """Of a turn in the sequence of all epochs."""
        return self.number + turn * self.count


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items. A thread makes the next one while the last one is used."""
    asked: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[Item | BaseException] = SimpleQueue()

    def make() -> None:
        while asked.get():
            try:
                made.put(next(items))
            except BaseException as error:
                made.put(error)

    Thread(target=make, daemon=True).start()
    asked.put(True)
    try:
        while not isinstance(item := made.get(), BaseException):
            asked.put(True)
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        asked.put(False)

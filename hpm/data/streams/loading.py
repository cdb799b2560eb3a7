"""Batches from a stream, in loading workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from hpm.core.errors import UserError, counted, one_line
from hpm.data.arrays import Opened, UnreadableImage, at_depth
from hpm.data.loader import Batch, Sample, TrainingViews, collate
from hpm.data.streams.head import EntrySource, open_entry
from hpm.data.streams.lanes import Cursor, Lane, Read
from hpm.data.streams.stream import Stream, image_name
from hpm.data.workers import batch_loader

MOST_UNREADABLE = 1000  # images in a row


@dataclass(frozen=True)
class Sharing:
    """Which lanes a process reads. A run keeps its lanes when it is resumed by fewer processes or
    workers, and with them the order of its images.

    processes, workers: with which the run began; there is a lane for each worker of each process.
    rank, world_size: of the present processes, whose number divides `processes`.
    """

    processes: int
    workers: int
    rank: int = 0
    world_size: int = 1

    @property
    def count(self) -> int:
        """Number of lanes."""
        return self.processes * self.workers

    @property
    def own(self) -> set[int]:
        """The lanes that this process reads."""
        return {lane for step in range(self.workers) for lane in self.lanes(step)}

    def lanes(self, step: int) -> list[int]:
        """The lanes that this process's part of a step's batch comes from, in order. Consecutive
        steps take the lanes of consecutive workers."""
        share = self.processes // self.world_size
        mine = range(self.rank * share, (self.rank + 1) * share)
        return [process * self.workers + step % self.workers for process in mine]


@dataclass(frozen=True)
class StreamOrder:
    """What determines the images of each step: see `Lane`, and `Sharing`."""

    stream: Stream
    sharing: Sharing
    seed: int
    block: int
    first_index: int
    batch_size: int  # over all processes
    repeats: int  # views of each image


class Failure(str):
    """The text of a UserError in a worker, whose exceptions lose their form on the way."""


class StreamSteps(Dataset):
    """The batch of this process for each step. Steps must be asked for in order, those of one lane
    by one worker.

    views: make the views. deep: whether they are float32. cursors: where lanes begin.
    """

    def __init__(
        self,
        order: StreamOrder,
        views: TrainingViews,
        deep: bool,
        cursors: Mapping[int, Cursor],
    ):
        self.order, self.views, self.deep, self.cursors = order, views, deep, cursors
        self._lanes: dict[int, Lane] = {}
        self._image = _CurrentImage(order.stream.name, [], [])

    def __getitem__(self, step: int) -> Batch | Failure:
        order, sharing = self.order, self.order.sharing
        each = order.batch_size // sharing.processes // order.repeats
        samples: list[Sample] = []
        numbers = sharing.lanes(step)
        try:
            for number in numbers:
                samples += self._samples(self._lane(number), each)
        except UserError as error:
            return Failure(error)
        batch = collate(samples)
        batch.cursors = {number: self._lanes[number].cursor for number in numbers}
        return batch

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:  # opened in the worker that reads it
            order, sharing = self.order, self.order.sharing
            self._lanes[number] = Lane(
                order.stream,
                number,
                sharing.count,
                order.seed,
                order.block,
                order.first_index,
                self.cursors.get(number),
                ahead=get_worker_info() is not None,
            )
        return self._lanes[number]

    def _samples(self, lane: Lane, count: int) -> Iterator[Sample]:
        """Views of the next `count` readable images."""
        unreadable: list[tuple[int, str]] = []
        for read in lane:
            try:
                made = [self._sample(read, number) for number in range(self.order.repeats)]
            except (UnreadableImage, OSError) as error:
                unreadable.append((read.id, one_line(error)))
                if len(unreadable) == MOST_UNREADABLE:
                    raise UserError(
                        f"{self.order.stream.name}: {MOST_UNREADABLE} images in a row cannot be "
                        f"read, the last one {image_name(self.order.stream, read.id)} "
                        f"({unreadable[-1][1]})"
                    ) from None
                continue
            made[0].unreadable.extend(unreadable)
            unreadable = []
            yield from made
            count -= 1
            if count == 0:
                return

    def _sample(self, read: Read, number: int) -> Sample:
        self._image.current = read
        key = (read.epoch, read.id) if self.order.repeats == 1 else (*read[:2], number)
        view, crop = self.views(self._image, key)
        # The epoch is part of the id, because the images of a batch may be of two epochs.
        seeds = np.random.SeedSequence([read.epoch, read.id, number])
        own_id = int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return Sample(at_depth(view, self.deep), read.id, [], crop, own_id)


class _CurrentImage(EntrySource):
    """The image being read, as the source that views open it from."""

    current: Read

    def open(self, index: int) -> Opened:
        return open_entry(self.current.entry)


def stream_batches(
    steps: StreamSteps, first: int, last: int, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The batches of this process from step `first` up to `last`. Raises UserError if the stream
    cannot be read."""
    numbers: Iterator[Sequence[int]] = ([step] for step in range(first, last))
    loader = batch_loader(
        steps,
        numbers,
        _only,
        workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, Failure):
            raise UserError(str(batch))
        yield batch


def _only(batches: list[Batch | Failure]) -> Batch | Failure:
    return batches[0]


def share_workers(
    stream: Stream, workers: int | None, default: int, world_size: int, begun: Sharing | None
) -> tuple[int, Sharing]:
    """(number of workers to load with, 0 for none; the sharing of a run), not knowing this
    process's rank.

    Args:
        workers: as asked for; None for `default`, or as many as there are shards.
        world_size: number of processes.
        begun: how the run began, if it is resumed.

    Raises UserError if they are more than the shards, or cannot go on with what has begun.
    """
    shards = len(stream.shards)
    if begun is None:
        if world_size > shards:
            raise UserError(
                f"{stream.name}: {counted(shards, 'shard')} cannot be shared by {world_size} "
                "processes: start fewer, or write smaller shards"
            )
        if workers is None:
            workers = max(1, min(default, shards // world_size))
        lanes = max(1, workers) * world_size
        if lanes > shards:
            each = "" if world_size == 1 else f" of each of {world_size} processes"
            raise UserError(
                f"{stream.name}: {counted(shards, 'shard')} cannot be shared by "
                f"{counted(workers, 'worker')}{each}: pass --workers {shards // world_size}, or "
                "write smaller shards"
            )
        return workers, Sharing(world_size, max(1, workers), 0, world_size)
    if begun.processes % world_size:
        raise UserError(
            f"{stream.name}: the run began with {counted(begun.processes, 'process', 'processes')} "
            f"and goes on with as many, or a number that divides it, not {world_size}"
        )
    asked = default if workers is None else workers
    divisors = (n for n in range(1, begun.workers + 1) if begun.workers % n == 0)
    fitting = max(n for n in divisors if n <= max(1, asked))
    return (0 if asked == 0 else fitting), Sharing(begun.processes, begun.workers, 0, world_size)

"""Pre-training on a stream: which options it takes, its first images, and its progress."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.options import describe
from hpm.data.fingerprint import digest
from hpm.data.loader import Batch, TrainingViews
from hpm.data.streams.head import EntrySource, first_images
from hpm.data.streams.lanes import Cursor
from hpm.data.streams.loading import (
    Sharing,
    StreamOrder,
    StreamSteps,
    share_workers,
    stream_batches,
)
from hpm.data.streams.stream import Stream
from hpm.data.workers import num_workers
from hpm.training.images import TrainingImages

MEASURED = 512  # images that the statistics of the channels are measured on
FEWEST_READ = 1000  # images that max_unreadable is a share of, at least


@dataclass
class StreamReading:
    """Progress in a stream: who reads which lanes, with how many workers, and up to where.

    cursors: of the lanes of this process, after the last batch that was used.
    """

    sharing: Sharing
    workers: int
    cursors: dict[int, Cursor]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint. All processes call it."""
        cursors: dict[int, Cursor] = {}
        for part in distributed.gather(self.cursors):
            cursors |= part
        return {
            "processes": self.sharing.processes,
            "workers": self.sharing.workers,
            "cursors": {str(lane): list(cursor) for lane, cursor in sorted(cursors.items())},
        }


def check_stream(config: PretrainConfig) -> None:
    """Raise UserError for the first option that a stream does not have."""
    begin = f"{config.data} is a stream, whose number of images is not known"
    if config.steps is None:
        raise UserError(f"{begin}: pass --steps instead of --epochs")
    for name, described in describe(PretrainConfig).items():
        value = getattr(config, name)
        if described.rules.duration and value is not None and "epoch" in value:
            raise UserError(f"{begin}: pass {name} in steps or %, not '{value}'")
    if config.hard_share_by == "epoch":
        raise UserError(f"{begin}: leave hard_share_by epoch out")
    begin = f"{config.data} is a stream, whose images are read in order"
    if config.mines_by_memory or config.mine_every > 1:
        option = "mine_every" if config.mine_every > 1 else "mine_by"
        raise UserError(
            f"{begin}, but {option} {getattr(config, option)} remembers each image: leave it out"
        )
    if config.cache == "true":
        raise UserError(f"{begin}, but cache true keeps all of them in memory: leave it out")


def open_stream_images(config: PretrainConfig, stream: Stream) -> TrainingImages:
    """Read the first images of a stream, in the main process, and hold some out."""
    check_stream(config)
    _share(config, stream, None)  # a mistake is reported before anything is read
    count = config.holdout + MEASURED
    # The images themselves are sent: reading them in all processes would ask a server for one
    # shard as many times.
    found = distributed.main_first(lambda: first_images(stream, count))
    held_out = min(config.holdout, len(found) // 10) if len(found) < count else config.holdout
    entries, ids = found.entries, found.ids
    return TrainingImages(
        source=EntrySource(stream.name, entries[held_out:], ids[held_out:]),
        held_out=EntrySource(stream.name, entries[:held_out], ids[:held_out]) if held_out else None,
        has_split=False,
        # Without their folder, which may have moved.
        fingerprint={"shards": digest(posixpath.basename(shard) for shard in stream.shards)},
        stream=stream,
        first_index=ids[held_out] if held_out else 0,
    )


def begin_reading(
    config: PretrainConfig, images: TrainingImages, saved: dict[str, Any] | None
) -> tuple[StreamReading | None, list[str]]:
    """(where to begin in a stream, lines for the log); None if the images are no stream.

    saved: of the checkpoint, if the run is resumed. Raises UserError if it cannot go on with this
    number of processes.
    """
    stream = images.stream
    if stream is None:
        return None, []
    begun = Sharing(saved["processes"], saved["workers"]) if saved else None
    workers, sharing = _share(config, stream, begun)
    found = {int(lane): Cursor(*at) for lane, at in saved["cursors"].items()} if saved else {}
    # Only its own: those of other lanes will be old when the processes join theirs.
    cursors = {lane: cursor for lane, cursor in found.items() if lane in sharing.own}
    lines = []
    if saved and not stream.repeatable:
        lines.append(
            f"warning: {stream.name} need not return the same images in the same order when it is "
            "read again: some may be missing or seen twice in this epoch"
        )
    if begun and config.workers not in (None, workers):
        lines.append(
            f"{workers} of {config.workers} workers load, because the run began with "
            f"{begun.workers}, and the order of a stream's images depends on it"
        )
    return StreamReading(sharing, workers, cursors), lines


def read_stream(
    config: PretrainConfig,
    images: TrainingImages,
    reading: StreamReading,
    views: TrainingViews,
    steps: tuple[int, int],
    device: torch.device,
) -> Iterator[Batch]:
    """This process's part of each batch of a stream, from the first of `steps` up to the last.
    Keeps `reading` up to date with the batches that are used, not with those loaded ahead."""
    assert images.stream is not None
    order = StreamOrder(
        images.stream,
        reading.sharing,
        config.seed,
        config.shuffle,
        images.first_index,
        config.global_batch_size,
        config.repeat_augment,
    )
    made = StreamSteps(order, views, images.source.is_deep(), dict(reading.cursors))
    for batch in stream_batches(made, *steps, reading.workers, device.type == "cuda"):
        reading.cursors |= batch.cursors
        yield batch


def _share(config: PretrainConfig, stream: Stream, begun: Sharing | None) -> tuple[int, Sharing]:
    # Lanes must be the same everywhere, and machines may have different numbers of cores.
    default = min(distributed.gather(num_workers(None)))
    workers, sharing = share_workers(
        stream, config.workers, default, distributed.world_size(), begun
    )
    return workers, dataclasses.replace(sharing, rank=distributed.rank())

"""Several sources of images as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpm.data.arrays import Opened
from hpm.data.contract import Source, Splits
from hpm.data.video.clip import Video
from hpm.data.video.sources import holds_videos

UNLABELLED = -1


class Chain:
    """The images of several sources, one source after the other.

    Labels are indices into the classes of all sources; -1 (UNLABELLED) where an image has none.
    """

    def __init__(self, sources: Sequence[Source], partly_labelled: bool = True):
        """partly_labelled: keep the labels also if some of the sources have none."""
        self.sources = list(sources)
        self.name = " and ".join(source.name for source in self.sources)
        self.holds_videos = holds_videos(self.sources[0])
        self.classes = sorted({name for source in self.sources for name in source.classes})
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.labels: np.ndarray | None = None
        labelled = [source.labels is not None for source in self.sources]
        if any(labelled) if partly_labelled else all(labelled):
            self.labels = np.concatenate([self._labels(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, index: int) -> Opened:
        source, place = self.find(index)
        return source.open(place)

    def open_video(self, index: int) -> Video:
        source, place = self.find(index)
        return source.open_video(place)  # type: ignore[attr-defined]

    def read(self, index: int) -> bytes | None:
        source, place = self.find(index)
        return source.read(place)

    def is_deep(self) -> bool:
        return any(source.is_deep() for source in self.sources)

    def path(self, index: int) -> str:
        source, place = self.find(index)
        return source.path(place)

    def find(self, index: int) -> tuple[Source, int]:
        """The source of an image, and its index there."""
        number = self.number(index)
        return self.sources[number], index - int(self._ends[number - 1] if number else 0)

    def number(self, index: int) -> int:
        """Number of the source that an image comes from."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def _labels(self, source: Source) -> np.ndarray:
        if source.labels is None:
            return np.full(len(source), UNLABELLED, np.int64)
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[name] for name in source.classes], np.int64)[source.labels]


def chain(splits: Splits) -> Chain:
    """All images of a data set: those to train on, then those to test on."""
    return Chain([source for source in (splits.train, splits.test) if source is not None])

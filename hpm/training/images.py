"""The images of a run."""

from __future__ import annotations

from dataclasses import dataclass

from hpm.core.errors import counted
from hpm.core.wording import file_word
from hpm.data.fingerprint import Fingerprint
from hpm.data.sources import Source
from hpm.data.streams.stream import Stream, StreamNames
from hpm.data.unreadable import Named
from hpm.data.video.sources import holds_videos


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run.

    source: training images; of a stream, its first ones. held_out: images for evaluation.
    has_split: whether held_out comes from a split of its own. fingerprint: identifies the data when
    the run is resumed. stream: the training images, if they are read in order. first_index: images
    of the stream with lower ids are held out.
    """

    source: Source
    held_out: Source | None
    has_split: bool
    fingerprint: Fingerprint
    stream: Stream | None = None
    first_index: int = 0

    @property
    def count(self) -> int | None:
        """Number of training images; None for a stream."""
        return len(self.source) if self.stream is None else None

    @property
    def kind(self) -> str:
        """What is counted: `image` or, also of a run on single frames, `video`."""
        return file_word(holds_videos(self.source))

    @property
    def names(self) -> Named:
        """Names of the training images, for messages."""
        return self.source if self.stream is None else StreamNames(self.stream)

    def described(self) -> str:
        """How many they are, and of what."""
        if self.stream is None:
            return f"{counted(len(self.source), self.kind)} of {self.source.name}"
        return f"{counted(len(self.stream.shards), 'shard')} of {self.stream.name}"

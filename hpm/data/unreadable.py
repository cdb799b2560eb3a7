"""Replace unreadable images, and report each of them once; too many are an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.data.video.sources import holds_videos

MOST_TRIED = 1000  # images in place of one that cannot be read
IN_A_ROW = 100  # of them, if there are more images


def stand_ins(index: int, count: int) -> Iterator[int]:
    """An image, and those that replace it if it cannot be read, one after the other: the next ones,
    then any, since a disk with a part of a large data set may be missing."""
    following = count if count <= MOST_TRIED else IN_A_ROW
    yield from ((index + offset) % count for offset in range(following))
    if following < count:
        any_of_all = np.random.default_rng(index).integers(count, size=MOST_TRIED - following)
        yield from any_of_all.tolist()


@runtime_checkable
class Named(Protocol):
    """What the images are part of, and their names for messages: a source or a stream."""

    name: str

    def path(self, index: int) -> str: ...


class UnreadableImages:
    """Counts the unreadable images of a source over all processes.

    Args:
        source: the source of the images.
        share: largest share of its images that may be unreadable.
        known: indices of those that were found earlier, which are not reported again.

    `count` gives the number of its images. Of a stream, set it to those that have been read.
    """

    count: Callable[[], int]

    def __init__(self, source: Named, share: float, known: Iterable[int] = ()):
        self.source, self.share = source, share
        self.count = lambda: len(source)  # type: ignore[arg-type]
        # Of all processes, up to the last check. Checkpoints hold them, of millions of images: not
        # the reasons, which are in the log.
        self.indices = set(known)
        self._found: dict[int, str] = {}  # of this process since the last check

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, problems: Iterable[tuple[int, str]]) -> None:
        """Add (index, reason) of images that this process could not read."""
        self._found.update(problems)

    @property
    def has_news(self) -> bool:
        """Whether this process has found any since the last check."""
        return bool(self._found)

    def check(self, report: Callable[[str], None], news: bool = True) -> None:
        """Report new problems. Raises UserError if there are too many.

        All processes call it together, so that either all of them stop or none. news: whether any
        of them may have found some.
        """
        for found in distributed.gather(self._found) if news else ():
            for index, problem in found.items():
                if index not in self.indices:
                    report(f"cannot read {self.source.path(index)} ({problem}), passed over")
                    self.indices.add(index)
        self._found = {}
        count = self.count()
        if len(self.indices) > self.share * count:
            kind = "videos" if holds_videos(self.source) else "images"
            raise UserError(
                f"{len(self.indices)} of {count} {kind} cannot be read, more than "
                f"max_unreadable {self.share}: repair or remove them (each is named above, and in "
                "the log), or pass a larger --max-unreadable"
            )

"""Reports each unreadable image once; too many are an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.data.video.sources import holds_videos


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
        known: earlier problems by index, which are not reported again.

    `count` gives the number of its images. Of a stream, set it to those that have been read.
    """

    count: Callable[[], int]

    def __init__(self, source: Named, share: float, known: dict[int, str] | None = None):
        self.source, self.share = source, share
        self.count = lambda: len(source)  # type: ignore[arg-type]
        self.problems = dict(known or {})  # of all processes, up to the last check
        self._found: dict[int, str] = {}  # of this process since the last check

    def __len__(self) -> int:
        return len(self.problems)

    def add(self, problems: Iterable[tuple[int, str]]) -> None:
        """Add (index, reason) of images that this process could not read."""
        self._found.update(problems)

    def check(self, report: Callable[[str], None]) -> None:
        """Report new problems. Raises UserError if there are too many.

        All processes call it together, so that either all of them stop or none.
        """
        for found in distributed.gather(self._found):
            for index, problem in found.items():
                if index not in self.problems:
                    report(f"cannot read {self.source.path(index)} ({problem}), passed over")
                    self.problems[index] = problem
        self._found = {}
        count = self.count()
        if len(self.problems) > self.share * count:
            kind = "videos" if holds_videos(self.source) else "images"
            raise UserError(
                f"{len(self.problems)} of {count} {kind} cannot be read, more than "
                f"max_unreadable {self.share}: repair or remove them (each is named above, and in "
                "the log), or pass a larger --max-unreadable"
            )

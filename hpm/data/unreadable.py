"""Unreadable images: each is named once; too many are an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.data.sources import Source


class UnreadableImages:
    """Counts those of a source, over all processes.

    Args:
        source: whose images they are.
        share: of its images that may be unreadable.
        known: those of earlier, by index, with what is wrong; they are not named again.
    """

    def __init__(self, source: Source, share: float, known: dict[int, str] | None = None):
        self.source, self.share = source, share
        self.problems = dict(known or {})  # of all processes, as of the last check
        self._found: dict[int, str] = {}  # by this process since then

    def __len__(self) -> int:
        return len(self.problems)

    def add(self, problems: Iterable[tuple[int, str]]) -> None:
        """(index, what is wrong) of images that this process could not read."""
        self._found.update(problems)

    def check(self, report: Callable[[str], None]) -> None:
        """Report those that are new; UserError where they are too many.

        All processes do this together, so that all of them stop or none.
        """
        for found in distributed.gather(self._found):
            for index, problem in found.items():
                if index not in self.problems:
                    report(f"cannot read {self.source.path(index)} ({problem}), passed over")
                    self.problems[index] = problem
        self._found = {}
        if len(self.problems) > self.share * len(self.source):
            raise UserError(
                f"{len(self.problems)} of {len(self.source)} images cannot be read, more than "
                f"max_unreadable {self.share}: repair or remove them (each is named above, and in "
                "the log), or pass a larger --max-unreadable"
            )

"""Images by class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


def by_class(
    labels: Int[np.ndarray, " images"],
) -> Iterator[tuple[int, Int[np.ndarray, " members"]]]:
    """(label, ids of its images) of each label that occurs, both in order."""
    # Sorted once: with 20,000 classes, to look through millions of labels for each takes minutes.
    order = np.argsort(labels, kind="stable")
    ends = np.flatnonzero(np.diff(labels[order])) + 1
    for members in np.split(order, ends) if len(order) else ():
        yield int(labels[members[0]]), members

"""What tells whether images are those that a run began with, without reading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hpm.data.sources import DemoSource, FileSource, Source, Subset
from hpm.data.tables import TableSource

# Files whose size is looked up, spread evenly where there are more: each is a question to the file
# system, which takes 6 microseconds on a disk and may take a millisecond over a network.
SIZES = 20_000

Fingerprint = dict[str, str]


def fingerprint(source: Source) -> Fingerprint:
    """Names (relative to where the data lie) and sizes of image files, in order; rows and sizes of
    parquet and Arrow files. The same wherever the data lie; empty for other kinds of sources."""
    if isinstance(source, Subset):
        return fingerprint(source.source)
    if isinstance(source, DemoSource):
        return {"names": source.name}
    if isinstance(source, TableSource):
        return {"rows": str(len(source)), "sizes": _digest(_sizes(source.files))}
    if isinstance(source, FileSource):
        root = os.path.join(source.root, "")
        names = (path.removeprefix(root).replace(os.sep, "/") for path in source.paths)
        return {"names": _digest(names), "sizes": _digest(_sizes(source.paths))}
    return {}


def differing(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Which of names, rows and sizes are not the same."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _sizes(files: Sequence[str | Path]) -> Iterable[str]:
    count = len(files)
    for index in np.linspace(0, count - 1, min(count, SIZES)).astype(int).tolist():
        yield str(_size(files[index]))


def _size(file: str | Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:  # of an image that cannot be read; reading it says why
        return -1


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(os.fsencode(text) + b"\0")
    return digest.hexdigest()[:16]

"""Detect whether the images are still those that a run started with, without reading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpm.data.chain import Chain
from hpm.data.demo_sources import DemoSource, DemoVideos
from hpm.data.inspection import spaced
from hpm.data.litdata import LitDataSource
from hpm.data.sources import FileSource, Source, Subset
from hpm.data.tables import TableSource
from hpm.data.tars import TarSource
from hpm.data.video.sources import VideoFiles

# At most this many file sizes are read, evenly spaced. Each takes 6 microseconds on a local disk,
# and up to a millisecond over a network.
MAX_SIZES = 20_000

Fingerprint = dict[str, str]


def fingerprint(source: Source) -> Fingerprint:
    """Hashes of the relative names and sizes of image and video files, in order; for tables and
    LitData of their rows and the sizes of their files. Independent of the folder's location. Empty
    for other sources."""
    if isinstance(source, Subset):
        return fingerprint(source.source)
    if isinstance(source, Chain):
        each = [fingerprint(part) for part in source.sources]
        keys = sorted({key for part in each for key in part})
        return {key: digest(part.get(key, "") for part in each) for key in keys}
    if isinstance(source, DemoSource | DemoVideos):
        return {"names": source.name}
    if isinstance(source, TableSource | LitDataSource):
        return {"rows": str(len(source)), "sizes": digest(_sizes(source.files))}
    if isinstance(source, TarSource):
        return {"names": digest(source.members), "sizes": digest(_sizes(source.archives))}
    if isinstance(source, FileSource | VideoFiles):
        parts = source.paths.relative_to(source.root)
        names = _digest(part.replace(os.sep.encode(), b"/") for part in parts)
        return {"names": names, "sizes": digest(_sizes(source.paths))}
    return {}


def differing(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Which of names, rows and sizes differ."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _sizes(files: Sequence[str | Path]) -> Iterable[str]:
    for index in spaced(len(files), MAX_SIZES):
        yield str(_size(files[index]))


def _size(file: str | Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:  # reading the image will report why
        return -1


def digest(texts: Iterable[str]) -> str:
    """A short hash of some texts, in order."""
    return _digest(os.fsencode(text) + b"\0" for text in texts)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]

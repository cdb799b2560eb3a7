"""Detect whether the images are still those that a run started with, without reading them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

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
MAX_ENDS, END = 2_000, 64  # files of which this many last bytes are read

Fingerprint = dict[str, str]


@runtime_checkable
class Annotated(Protocol):
    """A source with masks or objects."""

    def annotations_digest(self) -> str:
        """A hash of all annotations."""
        ...


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


def annotated(source: Source) -> Fingerprint:
    """The same for a training with annotations, which also depends on which images of the source
    it takes, and on their labels, masks or objects."""
    found = fingerprint(source)
    while isinstance(source, Subset):
        found["images"] = digest([found.get("images", ""), *map(str, source.indices.tolist())])
        source = source.source
    if source.labels is not None:
        found["labels"] = digest(map(str, source.labels.tolist()))
    elif isinstance(source, Annotated):
        found["annotations"] = source.annotations_digest()
    return found


def differing(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Which of names, rows, sizes and so on differ."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def contents_digest(files: Sequence[str | Path]) -> str:
    """A hash of the sizes and ends of files: that of a PNG holds a checksum of its pixels."""
    ends = (_end(files[index]) for index in spaced(len(files), MAX_ENDS))
    return _digest([digest(_sizes(files)).encode(), *ends])


def _end(file: str | Path) -> bytes:
    with contextlib.suppress(OSError), open(file, "rb") as opened:  # reading it will report why
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - END))
        return opened.read()
    return b""


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

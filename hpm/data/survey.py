"""Look at a sample of a data set: how many images, how large, which channels, which are damaged or
there twice."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from hpm.core.errors import one_line
from hpm.data.arrays import DEEP_MODES, ArrayImage, Opened, UnreadableImage
from hpm.data.inspection import spaced
from hpm.data.jpeg import JpegImage
from hpm.data.loader import evaluation_views
from hpm.data.paths import Files
from hpm.data.sources import Source
from hpm.data.video.sampling import ClipSampling

GREY_MODES = ("1", "L", *DEEP_MODES)
MOST_CHANNELS = 32  # of `--channels`
Progress = Callable[[Sequence[Any], str], Iterable[Any]]  # shows how far a loop is


@dataclass
class Survey:
    """What a data set holds, as far as a sample of it shows.

    count: images (or videos); None for a stream. looked_at: images of the sample. unreadable:
    (name, reason) of those that cannot be used. widths, heights: in pixels, of the others.
    channels: the number of images of each number of channels in a file. view_channels: the
    `--channels` that suits most. searched: images among which copies were looked for, byte by byte;
    duplicates: those that are a copy of another one. decode_seconds: median time of one view.
    """

    name: str
    count: int | None
    classes: int
    looked_at: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    channels: dict[int, int] = field(default_factory=dict)
    view_channels: int = 3
    searched: int = 0
    duplicates: int = 0
    decode_seconds: float = 0.0

    @property
    def short_side(self) -> float:
        """Median of the shorter side in pixels."""
        return statistics.median(map(min, zip(self.widths, self.heights, strict=True)))


def survey(
    source: Source,
    look_at: int,
    search: int,
    size: tuple[int, int],
    sampling: ClipSampling | None,
    progress: Progress,
) -> Survey:
    """Open and decode evenly spaced images (or clips, with `sampling`), and look for copies.

    Args:
        look_at: number of images to decode, at most. search: to look for copies among, at most.
        size: (height, width) of the views that are decoded.
    """
    sample = spaced(len(source), look_at)
    found = Survey(source.name, len(source), len(source.classes), len(sample))
    readable = []
    for index in progress(sample, "opening images"):
        try:
            width, height, channels = shape_of(source.open(index))
        except (UnreadableImage, OSError) as error:
            found.unreadable.append((source.path(index), one_line(error)))
            continue
        readable.append((index, channels))
        found.widths.append(width)
        found.heights.append(height)
    found.channels = dict(Counter(channels for _, channels in readable))
    found.view_channels = view_channels(found.channels)
    views = evaluation_views(size, found.view_channels, sampling=sampling)
    seconds = []
    for index, _ in progress(readable, "decoding images"):
        start = time.perf_counter()
        try:
            views(source, (0, index))
        except (UnreadableImage, OSError) as error:
            found.unreadable.append((source.path(index), one_line(error)))
        else:
            seconds.append(time.perf_counter() - start)
    found.decode_seconds = statistics.median(seconds) if seconds else 0.0
    found.searched, found.duplicates = duplicates(source, spaced(len(source), search), progress)
    return found


def shape_of(image: Opened) -> tuple[int, int, int]:
    """(width, height, channels) of an image as it is stored, not decoded. Raises UnreadableImage if
    it is not one."""
    if isinstance(image, JpegImage):
        image = image.opened()
    if isinstance(image, Image.Image):
        bands = len(image.getbands())
        if image.mode in GREY_MODES:
            return *image.size, 1
        return *image.size, 4 if bands == 4 and image.mode.endswith(("A", "a")) else 3
    return _array_shape(image)


def _array_shape(image: ArrayImage) -> tuple[int, int, int]:
    shape, axes = image.shape, image.axes
    if not axes and len(shape) == 3:  # the shorter end is taken to be the channels
        axes = "CYX" if shape[0] < shape[2] else "YXC"
    elif not axes and len(shape) == 2:
        axes = "YX"
    if sorted(axes) not in (["X", "Y"], ["C", "X", "Y"]):
        raise UnreadableImage(f"{'x'.join(map(str, shape))} values, which is not one image")
    channels = shape[axes.index("C")] if "C" in axes else 1
    return shape[axes.index("X")], shape[axes.index("Y")], channels


def view_channels(found: dict[int, int]) -> int:
    """The `--channels` that keeps most images: 1 if all are grey, 3 for pictures, whose
    transparency is dropped, or the most frequent number of bands."""
    if not found:
        return 3
    pictures = sum(number for channels, number in found.items() if channels in (1, 2, 3, 4))
    others = {c: n for c, n in found.items() if c not in (1, 2, 3, 4)}
    if others and max(others.values()) > pictures:
        return min(max(others, key=lambda channels: others[channels]), MOST_CHANNELS)
    return 1 if max(c for c in found if c in (1, 2, 3, 4)) <= 2 else 3


def duplicates(source: Any, indices: Sequence[int], progress: Progress) -> tuple[int, int]:
    """(images looked at, those of them whose bytes are those of another one). (0, 0) if the source
    does not store files. Only files of equal size are read."""
    by_size: dict[int, list[int]] = {}
    searched = 0
    for index in progress(indices, "comparing files"):
        size = _stored_size(source, index)
        if size is not None:
            searched += 1
            by_size.setdefault(size, []).append(index)
    copies = 0
    for same in by_size.values():
        if len(same) > 1:
            hashes = [_hash(source, index) for index in same]
            known = [each for each in hashes if each is not None]
            copies += len(known) - len(set(known))
    return searched, copies


def _stored_size(source: Any, index: int) -> int | None:
    """Bytes of an image as it is stored; None if it is not stored, or cannot be read."""
    try:
        if isinstance(source, Files):
            path = source.paths[index]
            return None if os.path.isdir(path) else os.stat(path).st_size
        data = source.read(index)
    except OSError:
        return None
    return None if data is None else len(data)


def _hash(source: Any, index: int) -> bytes | None:
    try:
        data = source.read(index)
    except OSError:
        return None
    return None if data is None else hashlib.sha256(data).digest()

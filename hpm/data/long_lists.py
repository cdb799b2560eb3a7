"""Read lists of millions of files in seconds, into arrays that loading workers share.

To ask for a file takes a microsecond on a local disk, and up to a millisecond over a network. So
only some of the files are asked for, and a line tells by itself whether it ends in a label: one
that ends in the suffix of an image does not.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from hpm.core.errors import UserError
from hpm.data.folders import IMAGE_SUFFIXES
from hpm.data.notes import say_if_some_are_labelled
from hpm.data.paths import Paths

BLOCK = 1 << 23  # bytes that are split at once; no line may be longer
LONGEST_LABEL = 128  # bytes
SPACE, NEWLINE = b" \n"
# Marks of a block that is rewritten line by line first, which takes ten times as long.
UNTIDY = (b"\r", b"\0", b"\n\n", b"\n ", b" \n", b"\n\t", b"\t\n", b"//", b"/./", b"\n./")

# (path, label) of a line with spaces that does not tell which of them is meant. Raises UserError.
Split = Callable[[str], tuple[str, str | None]]


class Lines(NamedTuple):
    """Lines of a list.

    names: each with a zero byte behind it. ends: where the next one begins. labels: bytes, of those
    that have one.
    """

    names: bytes
    ends: np.ndarray
    labels: np.ndarray


def count_lines(path: Path) -> int:
    """At most one more than a file has. Raises OSError."""
    with path.open("rb") as file:
        return 1 + sum(data.count(b"\n") for data in iter(lambda: file.read(BLOCK), b""))


def read_long_list(
    path: Path, most: int, split: Split
) -> tuple[Paths, np.ndarray | None, list[str]]:
    """(paths, index of each one's label, labels in the order in which they appear) of a list; None
    and no labels unless each line has one. The existence of the files is not checked.

    most: an upper bound of its lines. Raises OSError, UnicodeDecodeError or UserError.
    """
    names, ends = bytearray(), np.empty(most, np.uint32)
    numbers, known = np.empty(0, np.int64), dict[bytes, int]()
    count = labelled = 0
    root = str(path.parent).encode()
    for block in _blocks(path, root):
        lines = _parse(block, split)
        if (longest := lines.labels.itemsize) > LONGEST_LABEL:
            raise UserError(f"{path}: a label of {longest} bytes, more than {LONGEST_LABEL}")
        if len(names) + len(lines.names) >= 1 << 32:
            raise UserError(f"{path}: more than 4 GB of paths: divide the list")
        ends[count : count + len(lines.ends)] = lines.ends + len(names)
        names += lines.names
        count += len(lines.ends)
        if len(lines.labels):
            if not labelled:
                numbers = np.empty(most, np.int64)
            found, inverse = np.unique(lines.labels, return_inverse=True)
            of = np.array([known.setdefault(_text(label), len(known)) for label in found])
            numbers[labelled : labelled + len(inverse)] = of[inverse]
            labelled += len(inverse)
    paths = Paths.of_names(names, ends[:count], "" if root == b"." else os.fsdecode(root))
    if not labelled or labelled < count:
        say_if_some_are_labelled(str(path), labelled, count)
        return paths, None, []
    return paths, numbers[:count], [label.decode() for label in known]


def _blocks(path: Path, root: bytes) -> Iterator[bytes]:
    """The lines of a file, some millions of bytes at a time; each block begins and ends with a line
    break. Paths below the list's folder become relative to it."""
    rest = b""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        while data := file.read(BLOCK):
            lines, _, rest = (rest + data).rpartition(b"\n")
            if len(rest) > BLOCK:
                raise UserError(f"{path}: a line of more than {BLOCK} bytes")
            yield _tidy(b"\n" + lines + b"\n", root)
    yield _tidy(b"\n" + rest + b"\n", root)


def _tidy(block: bytes, root: bytes) -> bytes:
    text = block.decode("utf-8")
    if any(mark in block for mark in UNTIDY):
        lines = (line.strip() for line in text.replace("\0", "").splitlines())
        kept = [str(PurePosixPath(line)) for line in lines if line]
        block = "\n".join(["", *kept, ""]).encode() if kept else b"\n"
    return block.replace(b"\n" + root + b"/", b"\n")


def _parse(block: bytes, split: Split) -> Lines:
    text = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero(text == NEWLINE)
    starts, stops = breaks[:-1] + 1, breaks[1:]  # of each line
    spaces = np.flatnonzero(text == SPACE)
    if not len(spaces):
        return Lines(block[1:].replace(b"\n", b"\0"), stops, np.empty(0, np.uint64))
    # The last space of each line is where a label would begin.
    last = np.concatenate([[-1], spaces])[np.searchsorted(spaces, stops)]
    has_label = _labelled(block, text, starts, stops, last, split)
    name_ends = stops.copy()
    name_ends[has_label] = _before_spaces(text, last[has_label])
    edges = np.zeros(len(text) + 1, np.int8)
    edges[starts] += 1
    edges[name_ends + 1] -= 1
    names = text[np.cumsum(edges[:-1], dtype=np.int8).astype(bool)].copy()
    ends = np.cumsum(name_ends - starts + 1)
    names[ends - 1] = 0
    return Lines(names.tobytes(), ends, _cut(text, last[has_label] + 1, stops[has_label]))


def _labelled(
    block: bytes,
    text: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    last: np.ndarray,
    split: Split,
) -> np.ndarray:
    """Whether each line ends in a label."""
    spaced = last > starts
    front, whole = np.zeros_like(spaced), np.zeros_like(spaced)
    front[spaced] = _ends_as_image(text, _before_spaces(text, last[spaced]))
    whole[spaced] = _ends_as_image(text, stops[spaced])
    has_label = front & ~whole
    for line in np.flatnonzero(spaced & (front == whole)):
        has_label[line] = split(block[starts[line] : stops[line]].decode())[1] is not None
    return has_label


def _before_spaces(text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    ends = ends.copy()
    while (behind := text[ends - 1] == SPACE).any():
        ends[behind] -= 1
    return ends


def _ends_as_image(text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether what ends there has the suffix of an image, in capitals or not."""
    last = np.zeros(len(ends), np.uint64)
    for back in (5, 4, 3, 2, 1):
        last = last << np.uint64(8) | (text[ends - back] | 32).astype(np.uint64)
    found = np.zeros(len(ends), bool)
    for length in {len(suffix) for suffix in IMAGE_SUFFIXES}:
        codes = [int.from_bytes(s.encode()) for s in IMAGE_SUFFIXES if len(s) == length]
        part = last & np.uint64((1 << 8 * length) - 1)
        found |= np.isin(part, np.array(codes, np.uint64))
    return found


def _cut(text: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The bytes between positions; as numbers, which are sorted faster, where eight are enough."""
    width = max(8, int((stops - starts).max(initial=0)))
    if width > LONGEST_LABEL:
        return np.empty(0, f"S{width}")
    columns = starts[:, None] + np.arange(width)
    chars = np.where(columns < stops[:, None], text[np.minimum(columns, len(text) - 1)], 0)
    labels = chars.astype(np.uint8).view(">u8" if width == 8 else f"S{width}")[:, 0]
    return labels.astype(np.uint64) if width == 8 else labels


def _text(label: np.uint64 | bytes) -> bytes:
    return bytes(label) if isinstance(label, bytes) else int(label).to_bytes(8).rstrip(b"\0")

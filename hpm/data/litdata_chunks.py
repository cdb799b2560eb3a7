"""Chunks of LitData.

A chunk is the number of its samples, their offsets, and the samples; a sample is the sizes of its
columns and their bytes (all numbers are uint32). If all columns are plain values (texts, numbers,
bytes) of a dictionary, the samples are empty, and an Arrow file with the rows follows, then its
length and a mark.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import one_line
from hpm.data.tables import pyarrow_library

PIXELS = {"RGB": b"P6", "L": b"P5"}  # Pillow's modes that are a PPM without its header
ARROW_MARK = b"LDARW01\0"


@dataclass(frozen=True)
class Column:
    """A column of the samples. place: among all. format: LitData's name, without its parameter."""

    name: str
    place: int
    format: str


@dataclass(frozen=True)
class Index:
    """What `index.json` says.

    chunks: names of the files. sizes: int64 [chunks], their numbers of samples. columns: how many
    a sample has. image, label: of those columns; None for no label.
    """

    chunks: Sequence[str]
    sizes: np.ndarray
    columns: int
    image: Column
    label: Column | None


def _column_bytes(sample: bytes, index: Index, column: Column) -> bytes:
    """The bytes of a column of a sample. Raises ValueError if the sample is damaged."""
    head = 4 * index.columns
    if len(sample) < head:
        raise ValueError("the sample is cut off")
    sizes = struct.unpack_from(f"<{index.columns}I", sample)
    start = head + sum(sizes[: column.place])
    if head + sum(sizes) > len(sample):
        raise ValueError("the sample is cut off")
    return sample[start : start + sizes[column.place]]


def image_file(sample: bytes, index: Index) -> bytes:
    """The image of a sample, as the bytes of an image file. Raises ValueError."""
    data = _column_bytes(sample, index, index.image)
    if index.image.format != "pil":
        return data
    if len(data) < 12:
        raise ValueError("the pixels are cut off")
    width, height, length = struct.unpack_from("<3I", data)
    mode = data[12 : 12 + length].decode("ascii", "replace")
    if mode not in PIXELS:
        raise ValueError(f"pixels of Pillow's mode {mode[:20]}, not {' or '.join(PIXELS)}")
    return b"%s %d %d 255\n" % (PIXELS[mode], width, height) + data[12 + length :]


def label_texts(chunk: np.ndarray, index: Index, label: Column) -> list[str]:
    """The labels of a chunk (uint8), as text. Raises ValueError, IndexError or struct.error."""
    count = int(chunk[:4].view("<u4")[0])
    begins = chunk[4 : 4 + 4 * (count + 1)].view("<u4").tolist()
    texts = []
    for begin, end in pairwise(begins):
        head = chunk[begin : begin + 4 * index.columns].view("<u4").tolist()
        start = begin + 4 * index.columns + sum(head[: label.place])
        if start + head[label.place] > end:
            raise ValueError("a sample is cut off")
        texts.append(_label_text(bytes(chunk[start : start + head[label.place]]), label.format))
    return texts


def _label_text(value: bytes, kind: str) -> str:
    if kind == "int":
        return str(struct.unpack("<q", value)[0])
    return str(value == b"\x01") if kind == "bool" else value.decode("utf-8")


def stores_arrow(head: bytes) -> bool:
    """Whether a chunk, of which these are the first 12 bytes, stores its samples as Arrow."""
    count, first, second = struct.unpack("<3I", head)
    return count > 0 and first == second


def map_file(path: Path) -> Any:
    """A file as an Arrow buffer."""
    with pyarrow_library().memory_map(str(path)) as file:
        return file.read_buffer()


def arrow_table(chunk: Any) -> Any:
    """The rows of a chunk (an Arrow buffer) that stores them as Arrow. Raises ValueError."""
    arrow = pyarrow_library()
    size = len(chunk)
    end = bytes(chunk[max(0, size - 12) : size])
    if end[4:] != ARROW_MARK:
        raise ValueError("the rows are missing, or cut off")
    (length,) = struct.unpack_from("<I", end)
    rows = chunk.slice(max(0, size - 12 - length), length)
    try:
        is_file = bytes(rows[:6]) == b"ARROW1"
        opened = arrow.ipc.open_file(rows) if is_file else arrow.ipc.open_stream(rows)
        table = opened.read_all()
        table.validate(full=True)  # Arrow crashes on offsets beyond the data
        return table
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(one_line(error, 100)) from None


def arrow_value(table: Any, column: Column, place: int) -> bytes:
    """A value of a column of bytes. Raises ValueError."""
    if column.name not in table.column_names:
        raise ValueError(f"no column {column.name}")
    value = table[column.name][place].as_py()
    if not isinstance(value, bytes):
        raise ValueError("no bytes in this row")
    return value

"""LitData's optimised folders: `index.json` beside chunks of samples.

The `litdata` package is not used. It unpickles samples, imports modules that `index.json` names,
decodes images by another decoder, and copies chunks in background threads. Its layout is read here,
with nothing that could execute code; see `hpm.data.litdata_chunks`.
"""

from __future__ import annotations

import io
import json
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import UserError, one_line
from hpm.data.arrays import Opened
from hpm.data.inspection import any_deep
from hpm.data.lists import natural
from hpm.data.litdata_chunks import (
    Column,
    Index,
    arrow_table,
    arrow_value,
    image_file,
    label_texts,
    map_file,
    stores_arrow,
)
from hpm.data.opening import open_image

INDEX = "index.json"
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png")
LABEL_NAMES = ("label", "class", "target", "labels", "cls")
ENCODED = ("jpeg", "image", "tiff", "tifffile", "file", "bytes")  # formats that are image files
LABELS = ("int", "bool", "str", "text")


def is_litdata(folder: Path) -> bool:
    """Whether a folder is one of LitData's."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "chunks" in found and "config" in found


def read_index(name: str, text: str | bytes) -> Index:
    """Read `index.json`. name: of the folder, for messages.

    Raises UserError if it is damaged, or if the samples have no image that can be read.
    """
    try:
        found = json.loads(text)
        config, chunks = found["config"], found["chunks"]
        files = [str(chunk["filename"]) for chunk in chunks]
        sizes = np.array([int(chunk["chunk_size"]) for chunk in chunks], np.int64)
        formats = [str(each).partition(":")[0] for each in config["data_format"]]
        names = _names(config.get("data_spec"), len(formats))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: {INDEX} is damaged ({one_line(error, 100)})") from None
    _check(name, config, files)
    columns = [Column(*each) for each in zip(names, range(len(names)), formats, strict=True)]
    return Index(files, sizes, len(columns), _image(name, columns), _label(columns))


def _check(name: str, config: dict[str, Any], files: list[str]) -> None:
    for key in ("encryption", "compression", "ipc_compression"):
        if config.get(key):
            raise UserError(
                f"{name}: the chunks have {key.replace('ipc_', '')}, which is not supported: write "
                "them without it (encoded images do not become smaller)"
            )
    loader = config.get("item_loader") or "PyTreeLoader"
    if loader != "PyTreeLoader":
        raise UserError(f"{name}: the chunks are for {loader}, and hold no images")
    for file in files:
        if not file or file in (".", "..") or "/" in file or "\\" in file:
            raise UserError(f"{name}: the path {file[:100]!r} leads out of the folder")
    if not files:
        raise UserError(f"{name}: it has no chunks")


def _names(spec: str | None, count: int) -> list[str]:
    """The names of the columns: keys of dictionaries, or their places in lists."""
    paths = list(_leaves(json.loads(spec)[1])) if spec else []
    names = [".".join(path) or "image" for path in paths]
    return names if len(names) == count else [str(place) for place in range(count)]


def _leaves(spec: dict[str, Any]) -> Any:
    if spec["type"] is None:
        yield ()
        return
    children = spec["children_spec"]
    keys = json.loads(spec["context"]) if isinstance(spec["context"], str) else None
    if not isinstance(keys, list) or len(keys) != len(children):
        keys = range(len(children))
    for key, child in zip(keys, children, strict=True):
        for path in _leaves(child):
            yield (str(key), *path)


def _image(name: str, columns: list[Column]) -> Column:
    """The column named as an image, or else the first that holds one."""
    able = [column for column in columns if column.format in (*ENCODED, "pil")]
    named = [column for column in columns if column.name.lower() in IMAGE_NAMES]
    if named and named[0] not in able:
        pickled = named[0].format == "pickle"
        raise UserError(
            f"{name}: the column {named[0].name} is stored as {named[0].format}"
            + (", which executes code when it is loaded" if pickled else "")
            + ": write images as JPEG or PNG files, or as Pillow images"
        )
    # `bytes` may be anything; other formats are images for certain.
    found = named or [c for c in able if c.format not in ("bytes", "file")] or able
    if not found:
        listed = ", ".join(f"{column.name} ({column.format})" for column in columns)
        raise UserError(f"{name}: no column holds images: {listed}")
    return found[0]


def _label(columns: list[Column]) -> Column | None:
    able = [column for column in columns if column.format in LABELS]
    if all(column.name.isdigit() for column in columns):  # a list, such as (image, label)
        return able[0] if len(able) == 1 else None
    named = [column for column in able if column.name.lower() in LABEL_NAMES]
    return min(named, key=lambda c: LABEL_NAMES.index(c.name.lower()), default=None)


class LitDataSource:
    """The samples of a folder on a disk, in any order."""

    def __init__(self, folder: Path):
        self.name, self.folder = str(folder), folder
        try:
            text = (folder / INDEX).read_bytes()
        except OSError as error:
            raise UserError(f"{folder}: {INDEX} cannot be read ({one_line(error)})") from None
        self.index = read_index(self.name, text)
        self.files = [folder / chunk for chunk in self.index.chunks]
        self._ends = np.cumsum(self.index.sizes)
        self._tables: dict[int, Any] = {}  # of the chunks that this process has used
        there = set(os.listdir(folder))  # a look for each of ten thousand chunks takes longer
        missing = next((file for file in self.files if file.name not in there), None)
        if missing:
            raise UserError(f"{missing}: the chunk is missing")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> bytes:
        """Raises OSError."""
        chunk, place = self._find(index)
        try:
            if table := self._table(chunk):
                return arrow_value(table, self.index.image, place)
            with open(self.files[chunk], "rb") as file:
                file.seek(4 + 4 * place)
                begin, end = struct.unpack("<2I", file.read(8))
                file.seek(begin)
                return image_file(file.read(max(0, end - begin)), self.index)
        except (ValueError, struct.error) as error:
            raise OSError(one_line(error)) from None

    def open(self, index: int) -> Opened:
        return open_image(io.BytesIO(self.read(index)))

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        chunk, place = self._find(index)
        return f"{self.files[chunk]}, sample {place}"

    @property
    def labels(self) -> np.ndarray | None:
        return self._labelled[0]

    @property
    def classes(self) -> list[str]:
        return self._labelled[1]

    @cached_property
    def _labelled(self) -> tuple[np.ndarray | None, list[str]]:
        """(labels, classes), read when they are first asked for: they lie between the images."""
        label = self.index.label
        if label is None:
            return None, []
        texts: list[str] = []
        for chunk, file in enumerate(self.files):
            try:
                if table := self._table(chunk):
                    texts += map(str, table[label.name].to_pylist())
                else:
                    texts += label_texts(np.memmap(file, np.uint8, "r"), self.index, label)
            except (ValueError, LookupError, OSError, struct.error) as error:
                raise UserError(f"{file}: the labels cannot be read ({one_line(error)})") from None
        if len(texts) != len(self):
            raise UserError(f"{self.name}: {len(texts)} labels for {len(self)} samples")
        names = sorted(set(texts), key=natural)
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[text] for text in texts], np.int64), names

    def _table(self, chunk: int) -> Any:
        """The rows of a chunk that stores them as Arrow, memory-mapped; None for others."""
        if chunk not in self._tables:
            with open(self.files[chunk], "rb") as file:
                is_arrow = stores_arrow(file.read(12))
            self._tables[chunk] = arrow_table(map_file(self.files[chunk])) if is_arrow else None
        return self._tables[chunk]

    def _find(self, index: int) -> tuple[int, int]:
        """(number of the chunk, place in it) of a sample."""
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        return chunk, index - int(self._ends[chunk - 1] if chunk else 0)

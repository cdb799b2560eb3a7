"""Lists of images, and the labels of lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpm.core.errors import UserError
from hpm.data.inspection import spaced
from hpm.data.list_tables import MOST_CHECKED, SUFFIXES, read_table
from hpm.data.long_lists import count_lines, read_long_list
from hpm.data.notes import say_if_some_are_labelled
from hpm.data.paths import Paths


def natural(text: str) -> tuple[int, int | str]:
    """A key that sorts numbers by value, before text."""
    return (0, int(text)) if text.lstrip("-").isdigit() else (1, text)


def read_list(path: Path) -> tuple[Paths, np.ndarray | None, list[str]]:
    """(paths, labels, classes) of a list with `path label` per line, the label optional; paths are
    relative to the list's folder. See `labels_of`; for csv and tsv, `read_table`.

    Of more than MOST_CHECKED images, it is checked of as many whether they exist. Raises UserError.
    """
    try:
        if path.suffix.lower() in SUFFIXES:
            files, names = read_table(path)
            return Paths(files), *labels_of(path, names)
        most = count_lines(path)
        if most > MOST_CHECKED:
            return _read_long(path, most)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: neither a folder, parquet, an image, a video nor a text list of them"
        ) from None
    paths, names = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _split_line(path.parent, line.strip())
        if found is None:
            raise UserError(f"{path}, line {number}: no such image: {line.strip()}")
        paths.append(found[0])
        names.append(found[1])
    return Paths(paths), *labels_of(path, names)


def _read_long(path: Path, most: int) -> tuple[Paths, np.ndarray | None, list[str]]:
    def split(line: str) -> tuple[str, str | None]:
        found = _split_line(path.parent, line)
        if found is None:
            raise UserError(f"{path}: no such image: {line}")
        return found

    paths, labels, names = read_long_list(path, most, split)
    for index in spaced(len(paths), MOST_CHECKED):
        if not os.path.isfile(paths[index]):
            raise UserError(f"{path}: no such image: {paths[index]}")
    if labels is None:
        if not len(paths):
            raise UserError(f"{path}: the list is empty")
        return paths, None, []
    classes = sorted(names, key=natural)
    numbers = {name: number for number, name in enumerate(classes)}
    np.take(np.array([numbers[name] for name in names]), labels, out=labels)
    return paths, labels, classes


def labels_of(path: Path, names: Sequence[str | None]) -> tuple[np.ndarray | None, list[str]]:
    """(labels, classes) from the names in a list: int64 indices, or None unless all have a name
    (an empty one is none). Raises UserError if the list is empty."""
    if not names:
        raise UserError(f"{path}: the list is empty")
    known = [name for name in names if name]
    if len(known) < len(names):
        say_if_some_are_labelled(str(path), len(known), len(names))
        return None, []
    classes = sorted(set(known), key=natural)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in known]), classes


def _split_line(folder: Path, line: str) -> tuple[str, str | None] | None:
    """(image, label) of a line. A path may contain spaces. None if there is no such image."""
    path, _, label = line.rpartition(" ")
    if path and os.path.isfile(folder / path.strip()):
        return str(folder / path.strip()), label
    return (str(folder / line), None) if os.path.isfile(folder / line) else None

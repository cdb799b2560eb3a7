"""Lists of images, and the labels of lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpm.core.errors import UserError


def natural(text: str) -> tuple[int, int | str]:
    """A key that sorts numbers by value, before text."""
    return (0, int(text)) if text.lstrip("-").isdigit() else (1, text)


def read_list(path: Path) -> tuple[list[str], list[str | None]]:
    """(paths, labels) of a list with `path label` per line, the label optional; paths are relative
    to the list's folder. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: neither a folder, parquet, an image, a video nor a text list of them"
        ) from None
    paths, names = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, label = _split_line(path.parent, line.strip())
        if image is None:
            raise UserError(f"{path}, line {number}: no such image: {line.strip()}")
        paths.append(image)
        names.append(label)
    return paths, names


def labels_of(path: Path, names: Sequence[str | None]) -> tuple[np.ndarray | None, list[str]]:
    """(labels, classes) from the names in a list: int64 indices, or None without names. Raises
    UserError if the list is empty, or has a name in some lines only."""
    if not names:
        raise UserError(f"{path}: the list is empty")
    known = [name for name in names if name is not None]
    if not known:
        return None, []
    if len(known) < len(names):
        raise UserError(f"{path}: some lines have a label and some have none")
    classes = sorted(set(known), key=natural)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in known]), classes


def _split_line(folder: Path, line: str) -> tuple[str | None, str | None]:
    """(image, label) of a line. A path may contain spaces. The image is None if it is missing."""
    path, _, label = line.rpartition(" ")
    if path and os.path.isfile(folder / path.strip()):
        return str(folder / path.strip()), label
    return (str(folder / line), None) if os.path.isfile(folder / line) else (None, None)

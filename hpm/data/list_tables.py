"""Lists of images as tables: csv and tsv, with a header or without."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpm.core.errors import UserError, nearest
from hpm.data.inspection import spaced

SUFFIXES = (".csv", ".tsv")
# Names of the columns, best first.
PATHS = ("path", "image", "image_path", "filepath", "file", "filename", "file_name", "name", "id")
LABELS = ("label", "class", "class_name", "category", "target", "label_name")
MOST_CHECKED = 20_000  # images whose existence is checked


def read_table(path: Path) -> tuple[list[str], list[str | None]]:
    """(paths, labels) of a table. Its columns are found by their names (PATHS, LABELS); without a
    header, they are the first and, if there are several, the last. Paths are relative to the
    table's folder. Raises UserError."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(_rows(path, file.read()))
    if not rows:
        raise UserError(f"{path}: the list is empty")
    header = [cell.strip().lower() for cell in rows[0]]
    image = column_of(PATHS, header)
    if image is not None and not os.path.isfile(path.parent / rows[0][image]):
        label = column_of(LABELS, header)
        first, rows = 2, rows[1:]
    elif os.path.isfile(path.parent / rows[0][0]):
        image, label, first = 0, (len(rows[0]) - 1 or None), 1
    else:
        known = f"{nearest(header[0], PATHS)} (one of {', '.join(PATHS)})"
        raise UserError(f"{path}: no column of images among {', '.join(rows[0])}{known}")
    width = max(image, label or 0) + 1
    for number, row in enumerate(rows, first):
        if len(row) < width:
            raise UserError(f"{path}, row {number}: {len(row)} of {width} columns")
    paths = [os.path.join(path.parent, row[image].strip()) for row in rows]
    for index in spaced(len(paths), MOST_CHECKED):
        if not os.path.isfile(paths[index]):
            raise UserError(f"{path}, row {index + first}: no such image: {rows[index][image]}")
    return paths, [None if label is None else row[label].strip() for row in rows]


def column_of(names: Sequence[str], header: Sequence[str]) -> int | None:
    """The number of the first of some names that a header in lower case has."""
    return next((header.index(name) for name in names if name in header), None)


def _rows(path: Path, text: str) -> Iterator[list[str]]:
    """The rows that are not empty, separated by tabs, semicolons or commas, whichever the first
    line has."""
    head = text.partition("\n")[0]
    separator = next((mark for mark in ("\t", ";") if mark in head), ",")
    try:
        yield from (row for row in csv.reader(text.splitlines(), delimiter=separator) if any(row))
    except csv.Error as error:
        raise UserError(f"{path} is not a table of {path.suffix[1:]}: {error}") from None

"""The table of images beside a file of features: a CSV file with a row per image."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hpm.core.errors import UserError, one_line
from hpm.core.files import write_atomically

COLUMNS = ("index", "path", "label", "split")

# (position in the data, path, class name, split) of each image; the last two only where known.
Images = tuple[np.ndarray, Sequence[str], np.ndarray | None, np.ndarray | None]


def write_images(file: Path, parts: Iterable[Images]) -> None:
    """Write the rows of all parts, which know the same columns."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            for number, (ids, *others) in enumerate(parts):
                known = [
                    (name, values)
                    for name, values in zip(COLUMNS, (ids.tolist(), *others), strict=True)
                    if values is not None
                ]
                if number == 0:
                    writer.writerow(name for name, _ in known)
                writer.writerows(zip(*(values for _, values in known), strict=True))

    write_atomically(file, write)


def read_images(file: Path, features: Path) -> Images:
    """Read a table. Raises UserError, naming the file of features, if it is not one."""
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            rows = list(csv.reader(opened))
        columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
        ids = np.array(columns["index"], dtype=np.int64)
        paths = list(columns["path"])
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{file}: not the table of {features} ({one_line(error, 160)})") from None
    label, split = (
        np.array(columns[name], dtype=str) if name in columns else None for name in COLUMNS[2:]
    )
    return ids, paths, label, split

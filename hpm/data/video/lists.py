"""Lists of videos: `path label` lines, csv, the annotations of Kinetics and Something-Something."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hpm.core.errors import UserError, counted, one_line
from hpm.data.folders import VIDEO_SUFFIXES, find_files
from hpm.data.inspection import spaced
from hpm.data.list_tables import LABELS, MOST_CHECKED, column_of
from hpm.data.notes import say_once

SEPARATORS = ("\t", ",", ";")
# Names of the column of videos, best first.
PATHS = ("path", "video", "video_path", "file", "filename", "name", "id")
HEADERS = (*PATHS, *LABELS)  # first fields of a line that is a header
KINETICS = {"youtube_id", "time_start", "time_end"}

Row = tuple[str, str | None]  # (path, label)


class Columns(NamedTuple):
    """Where a table has the paths and the labels."""

    separator: str
    path: int
    label: int


def is_video_list(path: Path) -> bool:
    """Whether the first entry of a text list is a video file."""
    try:
        with path.open(encoding="utf-8") as lines:
            start = [next(lines, "") for _ in range(2)]
    except (OSError, UnicodeDecodeError):
        return False
    return any(suffix in line.lower() for line in start for suffix in VIDEO_SUFFIXES)


def read_video_list(path: Path) -> tuple[list[str], list[str | None]]:
    """(paths, labels) of a list. Paths are relative to the list's folder, and may be folders of
    frames.

    - text: `path`, `path label` or `path frames label`, separated by spaces, tabs, commas or
      semicolons, with or without a header. Columns that a header names (PATHS, LABELS) may lie in
      any order, beside others.
    - csv of Kinetics (label, youtube_id, time_start, time_end): files ID_START_END.mp4 anywhere
      below the list's folder; those that are missing are counted and passed over.
    - json of Something-Something ([{id, template}, ...]): files ID.webm anywhere below it.

    Raises UserError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: neither a folder, parquet, a video nor a text list") from None
    if path.suffix.lower() == ".json":
        rows = _with_known_files(path, lambda: _something_rows(text))
    elif set(text.partition("\n")[0].strip().split(",")) >= KINETICS:
        rows = _with_known_files(path, lambda: _kinetics_rows(text))
    else:
        rows = _lines(path, text)
    names = [name for _, name in rows]
    return [os.path.join(path.parent, file) for file, _ in rows], names


def _lines(path: Path, text: str) -> list[Row]:
    """Of more than MOST_CHECKED videos, it is checked of as many files whether they exist: to ask
    for each of millions would take minutes on a network file system."""
    rows = []
    lines = text.splitlines()
    is_long = len(lines) > MOST_CHECKED
    columns = _named_columns(lines[0]) if lines else None

    def exists(name: str) -> bool:
        return os.path.exists(path.parent / name)

    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        row = (_row(line, _is_named_video, columns) if is_long else None) or _row(
            line, exists, columns
        )
        if row is not None:
            rows.append(row)
        elif number > 1 or not _is_header(line):
            raise UserError(f"{path}, line {number}: no such video: {line}")
    for index in spaced(len(rows), MOST_CHECKED) if is_long else ():
        if not exists(rows[index][0]):
            raise UserError(f"{path}: no such video: {rows[index][0]}")
    return rows


def _named_columns(header: str) -> Columns | None:
    """The columns of a header that names both."""
    for separator in SEPARATORS:
        if separator in header:
            cells = [cell.strip().lower() for cell in _cells(header, separator)]
            path, label = column_of(PATHS, cells), column_of(LABELS, cells)
            if path is not None and label is not None:
                return Columns(separator, path, label)
    return None


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator))


def _row(line: str, is_video: Callable[[str], bool], columns: Columns | None) -> Row | None:
    """None if no part of the line is a video. A path may contain spaces."""
    if columns:
        cells = [cell.strip() for cell in _cells(line, columns.separator)]
        if len(cells) <= max(columns.path, columns.label) or not is_video(cells[columns.path]):
            return None
        return cells[columns.path], cells[columns.label]
    if is_video(line):
        return line, None
    for separator in SEPARATORS:
        if separator in line:
            first, *_, last = _cells(line, separator)
            if is_video(first.strip()):
                return first.strip(), last.strip()
    file, _, label = line.rpartition(" ")
    if file and is_video(file.strip()):
        return file.strip(), label
    file, _, frames = file.strip().rpartition(" ")
    if file and frames.isdigit() and is_video(file.strip()):
        return file.strip(), label
    return None


def _is_named_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def _is_header(line: str) -> bool:
    fields = line.lower().replace(";", ",").replace("\t", ",").replace(" ", ",").split(",")
    return fields[0].strip('" ') in HEADERS


def _kinetics_rows(text: str) -> list[Row]:
    """(name of the file without suffix, label) of each row."""
    return [
        (f"{r['youtube_id']}_{int(r['time_start']):06d}_{int(r['time_end']):06d}", r.get("label"))
        for r in csv.DictReader(text.splitlines())
    ]


def _something_rows(text: str) -> list[Row]:
    """(name of the file without suffix, label) of each entry. The label is the template, in which
    the objects are not named."""
    rows = []
    for entry in json.loads(text):
        label = entry.get("template", entry.get("label"))
        rows.append((str(entry["id"]), label and label.replace("[", "").replace("]", "")))
    return rows


def _with_known_files(path: Path, read: Callable[[], list[Row]]) -> list[Row]:
    """Rows whose names are found among the videos below the list's folder."""
    try:
        rows = read()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not the annotations of Kinetics (csv) or Something-Something (json): "
            f"{type(error).__name__} {one_line(error)}"
        ) from None
    files = {Path(file).stem: file for file in find_files(path.parent, VIDEO_SUFFIXES, ())[0]}
    found = [(files[name], label) for name, label in rows if name in files]
    if rows and not found:
        raise UserError(
            f"{path}: none of its {counted(len(rows), 'video')} is below {path.parent} "
            f"(the first would be {rows[0][0]}.mp4 or .webm)"
        )
    if len(found) < len(rows):
        say_once(f"{path}: {len(rows) - len(found)} of {len(rows)} videos are missing, passed over")
    return found

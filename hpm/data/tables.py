"""Images or videos in parquet or Arrow files, in Hugging Face's layout.

A row has `image: {bytes, path}` or `video: {bytes, path}`, and optionally `label: int`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import UserError, one_line
from hpm.data.arrays import Opened
from hpm.data.inspection import any_deep
from hpm.data.lists import natural
from hpm.data.notes import say_if_some_are_labelled
from hpm.data.opening import open_image
from hpm.data.split_names import train_and_test
from hpm.data.video.clip import Video, middle_frame
from hpm.data.video.decoding import pyav
from hpm.data.video.opening import open_video


class TableSource:
    """Rows of Arrow chunks, in memory that workers share."""

    files: list[Path]  # of the rows

    def __init__(self, name: str, where: str, table: Any, names: list[str]):
        """table: with a column `image` or `video`, and maybe `label`. names: class names, if known.
        where: file or folder, for messages about a row."""
        import pyarrow

        self.name, self.where = name, where
        column = _column(table.schema)
        self.holds_videos = column == "video"
        if self.holds_videos:
            pyav()  # a missing library is an error now, and not one of each video
        images = table[column]
        labels = table["label"] if "label" in table.schema.names else None
        try:
            for used in (images, labels):
                if used is not None:
                    used.validate(full=True)  # Arrow crashes on offsets beyond the data
        except pyarrow.ArrowException as error:
            raise UserError(f"{where}: the table is damaged ({one_line(error, 200)})") from None
        is_struct = pyarrow.types.is_struct(images.type)
        self._bytes = [part.field("bytes") if is_struct else part for part in images.chunks]
        self._ends = np.cumsum([len(part) for part in images.chunks], dtype=np.int64)
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if labels is not None:
            values = labels.to_pylist()
            # A test split with withheld labels has -1 or null for each.
            known = [v for v in values if v is not None and not (names and not 0 <= v < len(names))]
            say_if_some_are_labelled(name, len(known), len(values))
            self.classes = names or sorted({str(v) for v in known}, key=natural)
            numbers = {c: i for i, c in enumerate(self.classes)}
            if len(known) == len(values):
                self.labels = np.array([v if names else numbers[str(v)] for v in values])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> bytes:
        chunk, place = self.find(index)
        data = self._bytes[chunk][place].as_py()
        if data is None:
            raise OSError("no bytes in this row")
        return data

    def find(self, index: int) -> tuple[int, int]:
        """(number of the chunk, place in it) of a row."""
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        return chunk, index - int(self._ends[chunk - 1] if chunk else 0)

    def open(self, index: int) -> Opened:
        if self.holds_videos:
            return middle_frame(self.open_video(index))
        return open_image(io.BytesIO(self.read(index)))

    def open_video(self, index: int) -> Video:
        """Raises OSError or UnreadableImage."""
        return open_video(io.BytesIO(self.read(index)))

    def is_deep(self) -> bool:
        return not self.holds_videos and any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        return f"{self.where}, row {index}"


class ParquetSource(TableSource):
    """Parquet files, whose encoded images are kept in memory."""

    def __init__(self, name: str, files: Sequence[Path]):
        pyarrow = pyarrow_library()
        parquet = pyarrow.parquet
        self.files = list(files)
        try:
            schema = parquet.read_schema(self.files[0])
            _check_columns(self.files[0], schema)
            wanted = [c for c in (_column(schema), "label") if c in schema.names]
            table = parquet.read_table(list(map(str, self.files)), columns=wanted)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.files[0]}: not readable parquet ({one_line(error, 200)})"
            ) from None
        where = str(self.files[0]) if len(self.files) == 1 else name
        super().__init__(name, where, table, _label_names(schema.metadata or {}))


class ArrowSource(TableSource):
    """A split in the format of Hugging Face's `datasets.save_to_disk` and of `hpm prepare`.

    The files are memory-mapped: only what is read is loaded, and the system may evict it.
    """

    def __init__(self, name: str, folder: Path):
        pyarrow = pyarrow_library()
        self.files = arrow_files(folder)
        try:
            info = json.loads((folder / "dataset_info.json").read_text())
            tables = []
            for file in self.files:
                tables.append(pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all())
            table = pyarrow.concat_tables(table.replace_schema_metadata() for table in tables)
        except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            raise _unreadable(folder, error) from None
        _check_columns(folder, table.schema)
        features = info.get("features") or {}
        names = (features.get("label") or {}).get("names") or []
        super().__init__(name, str(folder), table, list(names))


def saved_splits(path: Path) -> tuple[str, str | None]:
    """(split to train on, split to test on) of a folder of splits saved by Hugging Face's
    `datasets` or `hpm prepare`. Raises UserError."""
    try:
        names = list(map(str, json.loads((path / "dataset_dict.json").read_text())["splits"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = one_line(error)
        raise UserError(f"{path}: dataset_dict.json has no splits ({reason})") from error
    train, test = train_and_test(names)
    if train is None:
        raise UserError(f"{path}: no split train among {', '.join(names) or 'none'}")
    return train, test


def arrow_files(folder: Path) -> list[Path]:
    """The files of a split in the format of `datasets.save_to_disk`. Raises UserError."""
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(folder, error) from None
    if not files:
        raise UserError(f"{folder}: it has no images")
    return files


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: not a readable Arrow data set ({one_line(error, 200)})")


def pyarrow_library() -> Any:
    """Raises UserError if it is missing."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet and Arrow need pyarrow: pip install 'hpm-vision[parquet]'"
        ) from None
    return pyarrow


def _check_columns(where: Path, schema: Any) -> None:
    import pyarrow

    column = _column(schema)
    if column not in schema.names:
        raise UserError(f"{where}: no column 'image' or 'video' (it has {', '.join(schema.names)})")
    encoded = schema.field(column).type
    if pyarrow.types.is_struct(encoded) and "bytes" not in [f.name for f in encoded]:
        raise UserError(f"{where}: column '{column}' has no field 'bytes'")


def _column(schema: Any) -> str:
    return "video" if "video" in schema.names and "image" not in schema.names else "image"


def _label_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Class names, as Hugging Face writes them into the schema; empty where there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []

"""Rows of tables, read in order: of the Hugging Face hub, of parquet and of Arrow files.

The library `datasets` finds them, and reads what is not parquet. Who reads which of its shards, the
order, and resuming are those of all streams (`hpm.data.streams.lanes`): its own shuffle buffer is
lost when it is resumed, and its division among processes leaves one of several workers without a
shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.data.columns import find_columns
from hpm.data.folders import files_below
from hpm.data.hugging_face import (
    EXTRA,
    PREFIX,
    HubName,
    chosen_splits,
    library_for,
    load_streaming,
)
from hpm.data.split_names import training_files
from hpm.data.streams.parquet import FEW, TOGETHER, Parquet
from hpm.data.streams.row_entries import row_entry
from hpm.data.streams.stream import Entry, Stream
from hpm.data.tables import arrow_files, pyarrow_library, saved_splits


class Rows:
    """Rows of a `datasets.IterableDataset` as a stream.

    Args:
        name: for messages.
        rows: an IterableDataset.
        column: of the images.
        remote: see `row_entry`.
    """

    repeatable = True

    def __init__(self, name: str, rows: Any, column: str, remote: str | None = None):
        self.name, self._column, self._remote = name, column, remote
        image = library_for(name).Image(decode=False)
        try:
            rows = rows.decode(False)  # for files, the library has threads that decode
            rows = rows.reshard() if rows.num_shards < FEW else rows
        except Exception as error:  # those of all formats and connections
            raise UserError(f"{name}: {one_line(error, 200)}") from None
        self._rows = rows.select_columns([column]).cast_column(column, image)
        count = rows.num_shards
        self.shards: Sequence[str] = [f"{name}, shard {n} of {count}" for n in range(count)]

    def read(self, shard: int) -> Iterator[Entry]:
        need("fsspec.asyn", EXTRA, self.name).reset_lock()  # this may be a fork
        part = self._rows.shard(num_shards=len(self.shards), index=shard)
        try:
            # Without batches, it would divide its one shard among the workers.
            for batch in part.iter(batch_size=TOGETHER):
                for value in batch[self._column]:
                    cell = value or {}
                    yield row_entry(cell.get("bytes"), cell.get("path"), self._remote)
        except Exception as error:  # after its own attempts
            text = one_line(error, 200) or type(error).__name__
            raise UserError(f"{self.shards[shard]}: {text}") from None


def hub_rows(data: str) -> Stream:
    """A data set of the hub as a stream; nothing is stored. Raises UserError."""
    name = HubName.parse(data)
    if name.split and "[" in name.split:
        raise UserError(f"{data}: a part of a split cannot be streamed: leave it out, or --stream")
    found, files = load_streaming(name)
    split = name.split or chosen_splits(name, found)[0]
    rows = found if name.split else found[split]
    column = _column(data, rows.features, name.image)
    remote = f"{PREFIX}datasets/{name.repo}@"
    of_split = files.get(split, [])
    if of_split and all(f.startswith(PREFIX) and f.endswith(".parquet") for f in of_split):
        return Parquet(data, of_split, column, remote)
    return Rows(data, rows, column, remote)


def local_rows(path: Path) -> Stream | None:
    """Parquet or Arrow files as a stream; None if a file or folder has none. Raises UserError."""
    kind, files = _tables(path)
    if not files:
        return None
    library = library_for(f"reading {path} as a stream")
    names = [str(file) for file in files]
    try:
        if kind == "parquet":
            schema = pyarrow_library().parquet.read_schema(names[0])
            features = library.Features.from_arrow_schema(schema)
        else:
            rows = library.load_dataset(kind, data_files=names, split="train", streaming=True)
            features = rows.features
    except Exception as error:  # those of Arrow and of the library
        raise UserError(f"{path}: not readable {kind} ({one_line(error, 200)})") from None
    column = _column(str(path), features, None)
    return Parquet(str(path), names, column) if kind == "parquet" else Rows(str(path), rows, column)


def _column(name: str, features: Any, image: str | None) -> str:
    """The column of the images. Raises UserError."""
    columns = find_columns(name, features, image, None)
    if columns.holds_videos:
        raise UserError(f"{name}: streams are of images, not of videos")
    return columns.media


def _tables(path: Path) -> tuple[str, list[Path]]:
    """(kind, files of the training split)."""
    if path.is_file():
        return "parquet", [path] if path.suffix.lower() == ".parquet" else []
    if (path / "dataset_dict.json").exists():
        path = path / saved_splits(path)[0]
    if (path / "state.json").exists():
        return "arrow", arrow_files(path)
    files = files_below(path, ".parquet")
    return "parquet", training_files(files, path) or files

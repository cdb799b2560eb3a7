"""Rows of tables, read in order: of the Hugging Face hub, of parquet and of Arrow files.

The library `datasets` reads them. Who reads which of its shards, the order, and resuming are those
of all streams (`hpm.data.streams.lanes`): its own shuffle buffer is lost when it is resumed, and
its division among processes leaves one of several workers without a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.data.columns import find_columns
from hpm.data.hugging_face import EXTRA, HubName, chosen_splits, library_for, load
from hpm.data.split_names import training_files
from hpm.data.streams.archives import LARGEST
from hpm.data.streams.stream import Entry
from hpm.data.tables import arrow_files, saved_splits

FEW = 128  # shards; fewer are divided further, which asks the server about each of them
TOGETHER = 16  # rows that are converted at once


class Rows:
    """Rows of a `datasets.IterableDataset` as a stream.

    Args:
        name: for messages.
        rows: an IterableDataset.
        column: of the images.
        remote: beginning of the paths of its files. Rows may have such a path in place of bytes.
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
                    yield self._entry(value)
        except Exception as error:  # after its own attempts
            text = one_line(error, 200) or type(error).__name__
            raise UserError(f"{self.shards[shard]}: {text}") from None

    def _entry(self, value: dict[str, Any] | None) -> Entry:
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
        name = Path(path).name if path else "row"
        if data is not None:
            return Entry(name, data)
        if path is None or not self._is_own(path):
            return Entry(name, problem="no bytes in this row")
        with need("fsspec", EXTRA, self.name).open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            return Entry(name, problem=f"more than {LARGEST} bytes")
        return Entry(name, data)

    def _is_own(self, path: str) -> bool:
        """Whether a path is that of a file of this data set, or of one inside a zip or tar file of
        it, as `zip://a.png::hf://...`. Others, which a table may name, are not read: fsspec would
        open any address, and with it those that the file there holds."""
        *inside, file = path.split("::")
        archives = all(part.startswith(("zip://", "tar://")) for part in inside)
        return self._remote is not None and file.startswith(self._remote) and archives


def hub_rows(data: str) -> Rows:
    """A data set of the hub as a stream; nothing is stored. Raises UserError."""
    name = HubName.parse(data)
    if name.split and "[" in name.split:
        raise UserError(f"{data}: a part of a split cannot be streamed: leave it out, or --stream")
    found = load(name, trusted=True, streaming=True)
    if not name.split:
        found = found[chosen_splits(name, found)[0]]
    return _rows(data, found, name.image, f"hf://datasets/{name.repo}@")


def local_rows(path: Path) -> Rows | None:
    """Parquet or Arrow files as a stream; None if a file or folder has none. Raises UserError."""
    kind, files = _tables(path)
    if not files:
        return None
    library = library_for(f"reading {path} as a stream")
    try:
        rows = library.load_dataset(
            kind, data_files=[str(file) for file in files], split="train", streaming=True
        )
    except Exception as error:  # those of Arrow and of the library
        raise UserError(f"{path}: not readable {kind} ({one_line(error, 200)})") from None
    return _rows(str(path), rows, None)


def _rows(name: str, rows: Any, image: str | None, remote: str | None = None) -> Rows:
    columns = find_columns(name, rows.features, image, None)
    if columns.holds_videos:
        raise UserError(f"{name}: streams are of images, not of videos")
    return Rows(name, rows, columns.media, remote)


def _tables(path: Path) -> tuple[str, list[Path]]:
    """(builder of `datasets`, files of the training split)."""
    if path.is_file():
        return "parquet", [path] if path.suffix.lower() == ".parquet" else []
    if (path / "dataset_dict.json").exists():
        path = path / saved_splits(path)[0]
    if (path / "state.json").exists():
        return "arrow", arrow_files(path)
    files = sorted(path.rglob("*.parquet"))
    return "parquet", training_files(files) or files

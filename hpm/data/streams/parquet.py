"""Parquet files, of a disk or of the Hugging Face hub, read in order by pyarrow.

The library `datasets` could read them, too. It copies an image twice as often, asks the hub for the
end of a file before each row group, and reads all columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.core.retries import may_pass
from hpm.data.hugging_face import EXTRA, PREFIX, library_for
from hpm.data.streams import transport
from hpm.data.streams.row_entries import row_entry
from hpm.data.streams.stream import Entry
from hpm.data.tables import pyarrow_library

FEW = 128  # files; fewer are divided into row groups, which asks for the end of each of them
TOGETHER = 16  # rows that are converted at once


class Parquet:
    """The images of a column of parquet files, as a stream.

    Args:
        name: for messages.
        files: paths, or `hf://datasets/USER/NAME@COMMIT/PATH`.
        column: of the images.
        remote: see `row_entry`.

    Raises UserError if a file cannot be read.
    """

    repeatable = True

    def __init__(self, name: str, files: Sequence[str], column: str, remote: str | None = None):
        self.name, self._column, self._remote = name, column, remote
        self._hub: Any = None
        if any(file.startswith(PREFIX) for file in files):
            # One for all threads and workers: each further one would ask for the repository again.
            self._hub = need("huggingface_hub", EXTRA, name).HfFileSystem()
        # Of a file of the hub, which never changes, its end is read once.
        self._ends: dict[str, tuple[int, Any]] = {}
        self._parts: list[tuple[str, int | None]] = [(file, None) for file in files]
        if len(files) < FEW:
            self._parts = [(file, group) for file in files for group in range(self._groups(file))]
        count = len(self._parts)
        self.shards: Sequence[str] = [f"{name}, shard {n} of {count}" for n in range(count)]

    def read(self, shard: int) -> Iterator[Entry]:
        done = failed = 0
        while True:
            try:
                for entry in islice(self._rows(*self._parts[shard]), done, None):
                    done, failed = done + 1, 0
                    yield entry
                return
            except Exception as error:  # those of Arrow and of all connections
                failed = _counted(failed, error, self.shards[shard])

    def _rows(self, file: str, group: int | None) -> Iterator[Entry]:
        with closing(self._opened(file)) as table:
            if self._column not in table.schema_arrow.names:
                raise ValueError(f"no column {self._column} in {file}")
            groups = range(table.num_row_groups) if group is None else [group]
            for number in groups:
                # A row group at a time: pyarrow fetches all that it is asked for at once.
                batches = table.iter_batches(TOGETHER, [number], [self._column], use_threads=False)
                for batch in batches:
                    for data, path in _cells(batch.column(0)):
                        yield row_entry(data, path, self._remote)

    def _opened(self, file: str) -> Any:
        """A `pyarrow.parquet.ParquetFile`."""
        parquet = pyarrow_library().parquet
        options = {"pre_buffer": self._hub is not None, "page_checksum_verification": True}
        if self._hub is None:
            return parquet.ParquetFile(file, **options)
        size, end = self._ends.get(file, (None, None))
        # Without a cache, what Arrow asks for is asked for, and copied once.
        body = self._hub.open(file, "rb", cache_type="none", size=size)
        return parquet.ParquetFile(body, metadata=end, **options)

    def _groups(self, file: str) -> int:
        """Number of row groups."""
        failed = 0
        while True:
            try:
                with closing(self._opened(file)) as table:
                    if self._hub is not None:
                        self._ends[file] = self._hub.size(file), table.metadata
                    return int(table.num_row_groups)
            except Exception as error:  # as above
                failed = _counted(failed, error, file)


def _cells(column: Any) -> Iterator[tuple[bytes | None, str | None]]:
    """(bytes, path) of the rows of a column."""
    if str(column.type) in ("binary", "large_binary", "binary_view"):
        yield from ((value.as_py(), None) for value in column)
        return
    is_struct = pyarrow_library().types.is_struct(column.type)
    if not is_struct or column.type.get_field_index("bytes") < 0:  # rare: arrays, or paths only
        column = library_for("images in a table").Image().cast_storage(column)
    fields = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
    paths = fields["path"].to_pylist() if "path" in fields else [None] * len(column)
    for data, path in zip(fields["bytes"], paths, strict=True):
        yield data.as_py(), path


def _counted(failed: int, error: Exception, name: str) -> int:
    """Count a failed attempt, and wait. Raises UserError if it was the last one, or if another one
    would fail, too."""
    if isinstance(error, UserError):
        raise error
    text = one_line(error, 200) or type(error).__name__
    if not _passes(error):
        raise UserError(f"{name}: {text}") from None
    if failed + 1 == transport.ATTEMPTS:
        raise UserError(f"{name}: {text} ({transport.ATTEMPTS} attempts)") from None
    time.sleep(transport.FIRST_WAIT * 2**failed)
    return failed + 1


def _passes(error: Exception) -> bool:
    """Whether another attempt may succeed. Errors of libraries for HTTP are no OSError, unless they
    hold an answer; Arrow has an OSError without a number for damage."""
    if (answer := getattr(error, "response", None)) is not None:
        return answer.status_code >= 500 or answer.status_code in transport.TEMPORARY_STATUS
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or may_pass(error)
    lasting = (pyarrow_library().ArrowException, ValueError, TypeError, LookupError, AttributeError)
    return not isinstance(error, lasting)

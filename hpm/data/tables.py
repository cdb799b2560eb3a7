"""Images in parquet or Arrow files, in Hugging Face's layout.

A row holds `image: {bytes, path}`, perhaps `label: int`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import UserError, one_line
from hpm.data.arrays import Opened, any_deep, open_image


class TableSource:
    """The rows of Arrow chunks, which all loading processes share."""

    files: list[Path]  # that hold them

    def __init__(self, name: str, where: str, images: Any, labels: Any, names: list[str]):
        """images, labels: columns of pyarrow (labels: None where there are none); names: those of
        the classes, where they are known; where: what a row is said to lie in."""
        import pyarrow

        self.name, self.where = name, where
        is_struct = pyarrow.types.is_struct(images.type)
        self._bytes = [part.field("bytes") if is_struct else part for part in images.chunks]
        self._ends = np.cumsum([len(part) for part in images.chunks], dtype=np.int64)
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if labels is not None:
            values = labels.to_pylist()
            self.classes = names or sorted({str(v) for v in values}, key=natural)
            numbers = {c: i for i, c in enumerate(self.classes)}
            # A test split whose labels are withheld has -1 for each, or nothing.
            if all(v is not None and not (names and not 0 <= v < len(names)) for v in values):
                self.labels = np.array([v if names else numbers[str(v)] for v in values])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> bytes:
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        start = self._ends[chunk - 1] if chunk else 0
        data = self._bytes[chunk][int(index - start)].as_py()
        if data is None:
            raise OSError("no bytes in this row")
        return data

    def open(self, index: int) -> Opened:
        return open_image(io.BytesIO(self.read(index)))

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        return f"{self.where}, row {index}"


class ParquetSource(TableSource):
    """Parquet files. The encoded bytes are held in memory."""

    def __init__(self, name: str, files: Sequence[Path]):
        pyarrow = _pyarrow()
        parquet = pyarrow.parquet
        self.files = list(files)
        try:
            schema = parquet.read_schema(self.files[0])
            _check_columns(self.files[0], schema)
            wanted = [c for c in ("image", "label") if c in schema.names]
            table = parquet.read_table(list(map(str, self.files)), columns=wanted)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.files[0]}: not readable parquet ({one_line(error, 200)})"
            ) from None
        labels = table["label"] if "label" in wanted else None
        where = str(self.files[0]) if len(self.files) == 1 else name
        super().__init__(name, where, table["image"], labels, _label_names(schema.metadata or {}))


class ArrowSource(TableSource):
    """A split as `datasets` of Hugging Face saves it to disk (`save_to_disk`), and `hpm prepare`.

    The files are mapped: only what is read comes into memory, and the system may drop it again.
    """

    def __init__(self, name: str, folder: Path):
        pyarrow = _pyarrow()
        try:
            state = json.loads((folder / "state.json").read_text())
            info = json.loads((folder / "dataset_info.json").read_text())
            files = [folder / entry["filename"] for entry in state["_data_files"]]
            if not files:
                raise UserError(f"{folder}: it has no images")
            self.files = files
            tables = []
            for file in files:
                tables.append(pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all())
            table = pyarrow.concat_tables(table.replace_schema_metadata() for table in tables)
        except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{folder}: not a readable Arrow data set ({one_line(error, 200)})"
            ) from None
        _check_columns(folder, table.schema)
        features = info.get("features") or {}
        names = (features.get("label") or {}).get("names") or []
        labels = table["label"] if "label" in table.schema.names else None
        super().__init__(name, str(folder), table["image"], labels, list(names))


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet and Arrow need pyarrow: pip install 'hpm[parquet]'") from None
    return pyarrow


def _check_columns(where: Path, schema: Any) -> None:
    import pyarrow

    if "image" not in schema.names:
        raise UserError(f"{where}: no column 'image' (it has {', '.join(schema.names)})")
    image = schema.field("image").type
    if pyarrow.types.is_struct(image) and "bytes" not in [f.name for f in image]:
        raise UserError(f"{where}: column 'image' has no field 'bytes'")


def _label_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Class names, as Hugging Face writes them into the schema; empty where there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def natural(text: str) -> tuple[int, int | str]:
    return (0, int(text)) if text.lstrip("-").isdigit() else (1, text)

"""Data sets of the Hugging Face hub, `hf://user/name`, by the library `datasets`.

Images are never decoded by that library, and no code of a data set is run: it has no such feature
any more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.core.hub import fetched
from hpm.data.columns import Columns, find_columns
from hpm.data.split_names import train_and_test
from hpm.data.tables import TableSource

Found = TypeVar("Found")
PREFIX = "hf://"
EXTRA = "datasets"
NAME = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:?]+))?"
    r"(?:/(?P<config>[^/:?]+))?(?::(?P<split>[^?]+))?(?:\?(?P<query>.*))?"
)


@dataclass(frozen=True)
class HubName:
    """`hf://USER/NAME[@REVISION][/CONFIG][:SPLIT][?image=COLUMN&label=COLUMN]`."""

    text: str
    repo: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, data: str) -> HubName:
        """Raises UserError."""
        found = NAME.fullmatch(data)
        columns = dict(parse_qsl(found["query"] or "", keep_blank_values=True)) if found else {}
        if found is None or not columns.keys() <= {"image", "label"}:
            raise UserError(
                f"{data}: write hf://user/name, and after it @revision, /config, :split and "
                "?image=COLUMN&label=COLUMN as needed"
            )
        revision = unquote(found["revision"]) if found["revision"] else None
        return cls(data, found["repo"], revision, found["config"], found["split"], **columns)


def is_hub(data: str) -> bool:
    return data.startswith(PREFIX)


def open_hub(data: str, trusted: bool) -> tuple[TableSource, TableSource | None]:
    """(split to train on, split to test on if there is one), downloaded into the library's cache.

    trusted: whether the user gave the name. If it comes from a file, nothing is downloaded.

    Raises UserError if they are not available.
    """
    name = HubName.parse(data)
    loaded = _load(name, trusted)
    if name.split:
        return _source(name, loaded, data), None
    train, test = chosen_splits(name, loaded)
    return (
        _source(name, loaded[train], f"{data} ({train})"),
        _source(name, loaded[test], f"{data} ({test})") if test else None,
    )


def load_streaming(name: HubName) -> tuple[Any, dict[str, list[str]]]:
    """(an IterableDataset if the name has a split, else a dictionary of them; the files of each
    split). Raises UserError."""

    def load(library: Any) -> tuple[Any, dict[str, list[str]]]:
        builder = library.load_dataset_builder(name.repo, name.config, revision=name.revision)
        files = {
            str(split): list(each) for split, each in (builder.config.data_files or {}).items()
        }
        return builder.as_streaming_dataset(split=name.split), files

    return _found(name, True, load)


def _load(name: HubName, trusted: bool) -> Any:
    """A Dataset if the name has a split, else a dictionary of them. Raises UserError."""
    return _found(
        name,
        trusted,
        lambda library: library.load_dataset(
            name.repo, name.config, split=name.split, revision=name.revision
        ),
    )


def _found(name: HubName, trusted: bool, load: Callable[[Any], Found]) -> Found:
    """What `load` returns, which is called with the library. Raises UserError."""
    library = library_for(name.text)

    def loading() -> Found | ValueError:
        hub = need("huggingface_hub.constants", EXTRA, name.text)
        before = library.config.HF_HUB_OFFLINE
        library.config.HF_HUB_OFFLINE = before or hub.HF_HUB_OFFLINE  # which `fetched` has set
        try:
            return load(library)
        except library.exceptions.DatasetsError as error:
            raise RuntimeError(one_line(error.__cause__ or error)) from None
        except ValueError as error:  # no such split or configuration; it lists those that exist
            return error
        finally:
            library.config.HF_HUB_OFFLINE = before

    command = f"python -c \"import datasets; datasets.load_dataset('{name.repo}')\""
    found = fetched(name.text, EXTRA, loading, None if trusted else command)
    if isinstance(found, ValueError):
        raise UserError(f"{name.text}: {one_line(found, 300)}")
    return found


@cache
def library_for(job: str) -> Any:
    """The library `datasets`. Raises UserError if it is missing."""
    library = need("datasets", EXTRA, job)
    # It would tell a server about each use, also of local files.
    library.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not sys.stderr.isatty():
        library.disable_progress_bars()
    return library


def chosen_splits(name: HubName, splits: dict[str, Any]) -> tuple[str, str | None]:
    """Names of the splits to train and to test on. Raises UserError if there is none to train
    on."""
    names = list(map(str, splits))
    train, test = train_and_test(names)
    if train is None and len(names) == 1:
        return names[0], None
    if train is None:
        raise UserError(
            f"{name.text}: no split train among {', '.join(names)}: name one, as in "
            f"hf://{name.repo}:{names[0]}"
        )
    return train, test


def _source(name: HubName, rows: Any, described: str) -> HubSource:
    columns = find_columns(name.text, rows.features, name.image, name.label)
    if not len(rows):
        raise UserError(f"{described}: the split is empty")
    return HubSource(described, rows, columns)


class HubSource(TableSource):
    """Rows of a data set in the library's cache, memory-mapped.

    Data sets made of image files have their paths in the rows. They are read if they lie in the
    cache.
    """

    def __init__(self, name: str, rows: Any, columns: Columns):
        used = {columns.media: "video" if columns.holds_videos else "image"}
        if columns.label:
            used[columns.label] = "label"
        table = rows.select_columns(list(used)).with_format("arrow")[:]
        table = table.rename_columns([used[column] for column in table.column_names])
        self.files = [Path(file["filename"]) for file in rows.cache_files]
        super().__init__(name, name, table, list(columns.classes))
        column = table["video" if columns.holds_videos else "image"]
        has_paths = "path" in [field.name for field in getattr(column.type, "fields", [])]
        self._paths = [part.field("path") for part in column.chunks] if has_paths else []

    def read(self, index: int) -> bytes:
        chunk, place = self.find(index)
        path = self._paths[chunk][place].as_py() if self._paths else None
        if path and not self._bytes[chunk][place].is_valid and _is_cached(path):
            return Path(path).read_bytes()
        return super().read(index)


def _is_cached(path: str) -> bool:
    """Whether a file lies in a cache of the hub. Others, which a table may name, are not read."""
    constants = need("huggingface_hub.constants", EXTRA, PREFIX)
    places = (constants.HF_HUB_CACHE, library_for(PREFIX).config.HF_DATASETS_CACHE)
    real = Path(path).resolve()
    return any(real.is_relative_to(Path(place).expanduser().resolve()) for place in places)

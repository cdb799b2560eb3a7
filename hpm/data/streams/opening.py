"""Open a stream by its name."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from hpm.core.errors import UserError
from hpm.data.folders import subfolders
from hpm.data.hugging_face import is_hub
from hpm.data.litdata import INDEX, is_litdata
from hpm.data.split_names import train_and_test
from hpm.data.streams.archives import Archives
from hpm.data.streams.chunks import Chunks
from hpm.data.streams.rows import hub_rows, local_rows
from hpm.data.streams.shards import names_archives
from hpm.data.streams.stream import Stream
from hpm.data.streams.transport import is_remote


def open_stream(data: str, trusted: bool = True, in_order: bool = False) -> Stream | None:
    """Open a stream; None if DATA names none.

    trusted: whether the user gave the name. If it comes from a file, no connection is made to a
    server that it names. in_order: open what can be read in any order as a stream, too.

    Raises UserError if there are no shards, or if DATA cannot be read in order.
    """
    if is_remote(data):
        if not trusted:
            raise UserError(
                f"{data}: pass DATA yourself to read it from a server that a file names"
            )
        return Chunks(data) if _names_folder(data) else Archives(data)
    path = Path(data).expanduser()
    if names_archives(data) and not path.is_dir():
        return Archives(data)
    return _in_order(data, path) if in_order else None


def _names_folder(url: str) -> bool:
    """Whether an address is that of a folder, as LitData's are, and not of archives."""
    path = url.partition("?")[0] if url.startswith("http") else url
    if path.endswith(("/", f"/{INDEX}")):
        return True
    return path.startswith("s3://") and "." not in PurePosixPath(path).name


def _in_order(data: str, path: Path) -> Stream:
    if is_hub(data):
        return hub_rows(data)
    if is_litdata(path):
        return Chunks(data)
    below = [p.name for p in subfolders(path) if is_litdata(p)] if path.is_dir() else []
    if train := train_and_test(below)[0]:
        return Chunks(str(path / train))
    if path.exists() and (rows := local_rows(path)):
        return rows
    raise UserError(
        f"{data}: --stream reads hf://user/name, parquet, Arrow and LitData folders, and archives: "
        "leave it out for images that are read in any order"
    )

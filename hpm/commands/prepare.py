"""`hpm prepare`: shrink images once and store them in a few large files that are fast to read.

The format is that of Hugging Face's `datasets.save_to_disk`. Each shard is written atomically by
one process, so that an interrupted command continues with the missing ones.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpm.commands.options import PrepareConfig
from hpm.commands.shrinking import shrunk
from hpm.core.errors import UserError, counted, one_line
from hpm.core.extras import need
from hpm.core.files import write_atomically, write_text
from hpm.core.progress import track
from hpm.data.arrays import UnreadableImage
from hpm.data.sources import PREPARING, Source, open_source
from hpm.data.video.sources import holds_videos
from hpm.data.workers import FORKS, num_workers

SHARD_IMAGES = 500
BATCH_BYTES = 2**25  # per record batch; must stay well below 2**31, because offsets are int32


@dataclass(frozen=True)
class Shard:
    """Images `start` to `stop` of a split."""

    split: str
    file: Path
    start: int
    stop: int

    @property
    def unreadable(self) -> Path:
        """File that lists the unreadable images and why."""
        return self.file.with_name(f".{self.file.stem}.unreadable.json")


@dataclass
class Prepared:
    """Number of images written, total bytes, and (path, problem) of each unreadable image."""

    images: int
    bytes: int
    unreadable: list[tuple[str, str]]

    def summary(self, out: str) -> str:
        """What was written into `out`, to print."""
        failed = counted(len(self.unreadable), "image")
        lines = [f"{failed} cannot be read: {out}/unreadable.txt"] if self.unreadable else []
        made = f"{counted(self.images, 'image')}, {self.bytes / 1e9:.3g} GB"
        return "\n".join([*lines, f"{made}, in {out}: hpm pretrain {shlex.quote(out)} --out ..."])


WriteShards = Callable[[list[Shard], dict[str, Source], PrepareConfig], Iterator[Shard]]


def prepare(config: PrepareConfig, write: WriteShards | None = None) -> Prepared:
    """Shrink the images of a source into a folder. Call it again to continue after an interruption.

    write: writes the missing shards, yielding each when it is done; by default in processes of this
        machine.

    Raises UserError on bad input, if no image can be read, and if the disk is full.
    """
    need("pyarrow", "parquet", "hpm prepare")
    if config.size < 1 or not 1 <= config.quality <= 100 or (config.workers or 0) < 0:
        raise UserError("size must be at least 1, quality 1 to 100, and workers not negative")
    out = Path(config.out)
    _check_folder(out, config)
    splits = open_splits(config)
    if holds_videos(splits["train"]):
        raise UserError(
            f"{config.data}: videos, but hpm prepare shrinks images; shrink videos with ffmpeg "
            f"(-vf scale=-2:{config.size} -g 16: more key frames are read faster)"
        )
    settings = _settings(config) | {"images": {name: len(s) for name, s in splits.items()}}
    _claim(out, settings)
    shards = {name: _shards(out, name, len(source)) for name, source in splits.items()}
    missing = [s for of_split in shards.values() for s in of_split if not s.file.exists()]
    writing = (write or _write_shards)(missing, splits, config)
    for _ in track(writing, "images", len(missing)):
        pass
    return _finish(out, splits, shards, settings)


def open_splits(config: PrepareConfig) -> dict[str, Source]:
    """The images of each split."""
    splits = open_source(config.data)
    return {"train": splits.train} | ({"test": splits.test} if splits.test else {})


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """The options that determine the result."""
    options = dataclasses.asdict(config)
    del options["out"], options["workers"]
    if config.data != "demo":
        options["data"] = str(Path(config.data).expanduser().resolve())
    return options


def _check_folder(out: Path, config: PrepareConfig) -> None:
    """Raise UserError unless `out` is empty or was started with the same options."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        started = json.loads((out / PREPARING).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{out} exists and was not made by hpm prepare: choose another --out"
        ) from None
    for name, value in _settings(config).items():
        if started.get(name) != value:
            raise UserError(
                f"{out} was started with {name} {started.get(name)}, not {value}: choose another "
                "--out, or pass the same options"
            )


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into `out`, or check that they are the same as before."""
    file = out / PREPARING
    if file.exists():
        before = json.loads(file.read_text())["images"]
        if before != settings["images"]:
            raise UserError(
                f"{settings['data']} has {settings['images']} images, but {out} was started with "
                f"{before}: choose another --out"
            )
        return
    write_text(file, json.dumps(settings, indent=2) + "\n")


def _shards(out: Path, split: str, count: int) -> list[Shard]:
    number = -(-count // SHARD_IMAGES)
    return [
        Shard(
            split,
            out / split / f"data-{i:05d}-of-{number:05d}.arrow",
            i * SHARD_IMAGES,
            min((i + 1) * SHARD_IMAGES, count),
        )
        for i in range(number)
    ]


def _write_shards(
    shards: list[Shard], splits: dict[str, Source], config: PrepareConfig
) -> Iterator[Shard]:
    """Write the shards, yielding each when it is done."""
    workers = min(num_workers(config.workers), len(shards))
    work = partial(write_shard, splits=splits, config=config)
    if workers <= 1 or not FORKS:
        for shard in shards:
            yield work(shard)
        return
    # Forked workers inherit `work`, and with it the sources, without pickling.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(work,)
    )
    try:
        for done in as_completed([pool.submit(_run_in_worker, shard) for shard in shards]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_function: Callable[[Shard], Shard]  # set in each worker


def _start_worker(work: Callable[[Shard], Shard]) -> None:
    global _worker_function
    _worker_function = work
    torch.set_num_threads(1)


def _run_in_worker(shard: Shard) -> Shard:
    return _worker_function(shard)


def write_shard(shard: Shard, splits: dict[str, Source], config: PrepareConfig) -> Shard:
    """Write one shard. Raises UserError if the disk is full."""
    source = splits[shard.split]
    write_atomically(shard.file, lambda file: _write_rows(file, shard, source, config))
    return shard


def _write_rows(file: Path, shard: Shard, source: Source, config: PrepareConfig) -> None:
    import pyarrow

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [("image", image)] + ([] if source.labels is None else [("label", pyarrow.int64())])
    schema = pyarrow.schema(fields)
    rows: list[dict[str, Any]] = []
    unreadable, buffered = [], 0
    with (
        pyarrow.OSFile(str(file), "wb") as sink,
        pyarrow.ipc.new_stream(sink, schema) as writer,
    ):
        for index in range(shard.start, shard.stop):
            try:
                data = shrunk(source, index, config.size, config.quality, config.channels)
            except (UnreadableImage, OSError) as error:
                unreadable.append((source.path(index), one_line(error)))
                continue
            row: dict[str, Any] = {"image": {"bytes": data, "path": source.path(index)}}
            if source.labels is not None:
                row["label"] = int(source.labels[index])
            rows.append(row)
            buffered += len(data)
            if buffered > BATCH_BYTES:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
                rows, buffered = [], 0
        writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
    write_text(shard.unreadable, json.dumps(unreadable))  # before the shard itself appears


def _finish(
    out: Path, splits: dict[str, Source], shards: dict[str, list[Shard]], settings: dict[str, Any]
) -> Prepared:
    """Write the files that turn the shards into a data set, and the list of unreadable images."""
    made = Prepared(0, 0, [])
    for shard in [shard for of_split in shards.values() for shard in of_split]:
        failed = json.loads(shard.unreadable.read_text())
        made.unreadable += [(path, problem) for path, problem in failed]
        made.images += shard.stop - shard.start - len(failed)
        made.bytes += shard.file.stat().st_size
    if made.images == 0:
        path, problem = made.unreadable[0]
        raise UserError(f"{settings['data']}: no readable image (the first, {path}: {problem})")
    for name, source in splits.items():
        _describe(out / name, source, [shard.file.name for shard in shards[name]])
    lines = [f"{path} ({problem})\n" for path, problem in made.unreadable]
    write_text(out / "unreadable.txt", "".join(lines))
    # Last: this file marks the folder as finished.
    write_text(out / "dataset_dict.json", json.dumps({"splits": list(splits)}) + "\n")
    return made


def _describe(folder: Path, source: Source, files: list[str]) -> None:
    """Write the two files from which `datasets` loads a split."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if source.labels is not None:
        features["label"] = {"names": source.classes, "_type": "ClassLabel"}
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": "hpm-prepare",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    write_text(folder / "dataset_info.json", json.dumps({"features": features}, indent=2) + "\n")
    write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")

"""Shards of `hpm embed`: parts of the result, each computed and saved at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpm.core import lock
from hpm.core.errors import UserError
from hpm.core.files import read_tensors, remove_stale, write_tensors, write_text
from hpm.core.progress import track
from hpm.data.chain import UNLABELLED, Chain
from hpm.data.sources import Subset
from hpm.evals.embedder import Arrays, Computed, Embedder
from hpm.evals.embeddings import ABOUT_FILE, FOLDER, FORMATS, Embeddings, Format

IN_A_FOLDER, IN_A_FILE = 10_000, 1_000  # images per shard
LARGEST = 2**28  # bytes of a shard, which is held in memory

# What a result was made with -> how messages call it.
SETTINGS = {
    "weights": "weights",
    "teacher": "teacher",
    "pool": "pool",
    "patches": "patches",
    "dtype": "dtype",
    "image_size": "image_size",
    "crop_share": "crop_share",
    "precision": "precision",
    "clip": "frames and stride",
    "images": "number of images",
}
Problems = list[tuple[int, str]]  # index of an unreadable image, and why


@dataclass(frozen=True)
class Shard:
    """Images `start` to `stop`."""

    file: Path
    start: int
    stop: int

    @property
    def problems_file(self) -> Path:
        """Lists the unreadable images. Written before the shard itself."""
        return self.file.with_name(f".{self.file.stem}.unreadable.json")

    def problems(self) -> Problems:
        """The unreadable images of a saved shard."""
        return [(index, why) for index, why in json.loads(self.problems_file.read_text())]


class Shards:
    """All shards of a result, saved or to be computed. Iterates over the rows of saved shards.

    In a folder the shards are the result. Of a file they are kept in `FILE.parts` until the file is
    written.
    """

    def __init__(self, out: Path, source: Chain, about: dict[str, Any], size: int | None) -> None:
        self.out, self.source = out, source
        self.format: Format = FOLDER if out.is_dir() or not out.suffix else FORMATS[out.suffix]
        self.in_folder = self.format is FOLDER
        self.folder = out if self.in_folder else out.with_name(f"{out.name}.parts")
        size = size or default_size(about, self.in_folder)
        count = -(-len(source) // size)
        suffix = ".parquet" if self.in_folder else ".safetensors"
        names = [f"part-{i:05d}-of-{count:05d}{suffix}" for i in range(count)]
        self.all = [
            Shard(self.folder / name, i * size, min((i + 1) * size, len(source)))
            for i, name in enumerate(names)
        ]
        self.about = about | {"parts": count}

    @property
    def unreadable_file(self) -> Path:
        """Lists the unreadable images, if there are any."""
        if self.in_folder:
            return self.out / "unreadable.txt"
        return self.out.with_suffix(".unreadable.txt")

    def claim(self) -> bool:
        """Lock the folder of shards for this process. Returns whether the result is complete.

        Raises UserError if there is something else in its place, or a result of other settings.
        """
        if not self.in_folder and self.out.exists():
            check_same(self.format.read_about(self.out), self.about, self.out)
            return True
        started = (self.folder / ABOUT_FILE).exists()
        if not started:
            self._check_free()
        lock.acquire(self.folder)
        remove_stale(self.folder)
        if not started:
            write_text(self.folder / ABOUT_FILE, json.dumps(self.about, indent=2) + "\n")
            return False
        before = FOLDER.read_about(self.folder)
        check_same(before, self.about, self.folder)
        if before["parts"] != len(self.all):
            raise UserError(
                f"{self.folder} was started with {before['parts']} shards, not {len(self.all)}: "
                "pass the same --shard-images, or choose another --out"
            )
        return self.in_folder and "rows" in before

    def missing(self) -> list[int]:
        """Numbers of the shards that are to be computed."""
        return [number for number, shard in enumerate(self.all) if not shard.file.exists()]

    def save(self, shard: Shard, rows: Embeddings, problems: Problems) -> None:
        """Save a shard atomically."""
        write_text(shard.problems_file, json.dumps(problems))
        if self.in_folder:
            FORMATS[".parquet"].write(shard.file, self.about | {"rows": len(rows)}, [rows])
            return
        arrays = {"ids": rows.ids, "features": rows.features, "patches": rows.patches}
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if a is not None}
        write_tensors(shard.file, tensors, {})

    def __iter__(self) -> Iterator[Embeddings]:
        for shard in self.all:
            if self.in_folder:
                yield FORMATS[".parquet"].read(shard.file, patches=True)
                continue
            tensors, _ = read_tensors(shard.file)
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            if len(arrays["ids"]):
                yield rows_of(self.source, arrays.pop("ids"), arrays, self.about)

    def problems(self) -> Problems:
        """The unreadable images of all saved shards."""
        saved = [shard for shard in self.all if shard.file.exists()]
        return [problem for shard in saved for problem in shard.problems()]

    def list_problems(self) -> Problems:
        """Write the list of unreadable images, if there are any, and return it."""
        found = self.problems()
        if found:
            lines = [f"{self.source.path(index)} ({why})\n" for index, why in found]
            write_text(self.unreadable_file, "".join(lines))
        return found

    def finish(self, rows: int, unreadable: int) -> None:
        """Write the result of saved shards."""
        self.about |= {"rows": rows, "unreadable": unreadable}
        self.format.write(self.out, self.about, self)
        lock.release(self.folder)
        if self.in_folder:
            (self.folder / lock.FILE).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder)

    def _check_free(self) -> None:
        """Raise UserError if writing would overwrite what is not ours."""
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} exists and was not made by hpm embed: choose another --out"
            )
        for file in self.format.files(self.out):
            if file.exists() and not file.is_dir():
                raise UserError(f"{file} exists: choose another --out")


def default_size(about: dict[str, Any], in_folder: bool) -> int:
    """Images per shard."""
    width = 2 if about["dtype"] == "float16" else 4
    row = sum(width * int(np.prod(about[name] or 0)) for name in ("features", "patches"))
    return max(1, min(IN_A_FOLDER if in_folder else IN_A_FILE, LARGEST // row))


def check_same(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise UserError if a result was made with other weights, settings or images."""
    for name, words in SETTINGS.items():
        if before.get(name) == now[name]:
            continue
        if name == "weights":
            raise UserError(
                f"{where} was made with other weights, of {before.get('run')}, step "
                f"{before.get('step')}: choose another --out"
            )
        raise UserError(
            f"{where} was made with {words} {before.get(name)}, not {now[name]}: choose another "
            "--out, or pass the same options"
        )
    if before.get("fingerprint") != now["fingerprint"]:
        raise UserError(
            f"{where} was made of other images than {now['data']} has now: choose another --out"
        )


def compute_shards(
    embedder: Embedder, source: Chain, shards: list[Shard], batch_size: int, workers: int
) -> Iterator[tuple[Shard, Embeddings, Problems]]:
    """Compute shards, yielding the rows and the unreadable images of each when it is done."""
    if not shards:
        return
    ids = np.concatenate([np.arange(shard.start, shard.stop) for shard in shards])
    ends = np.cumsum([shard.stop - shard.start for shard in shards]).tolist()
    waiting: list[Computed] = []
    batches = embedder.batches(Subset(source, ids), batch_size, workers)
    done = 0
    for batch in track(batches, "embedding", total=-(-len(ids) // batch_size)):
        waiting.append(batch)
        while done < len(shards) and batch.stop >= ends[done]:
            start = ends[done] - (shards[done].stop - shards[done].start)
            part = _between(waiting, start, ends[done], embedder)
            positions, arrays = part.positions, part.arrays
            problems = [(int(ids[at]), why) for at, why in part.unreadable]
            yield shards[done], rows_of(source, ids[positions], arrays, embedder.about), problems
            done += 1
            waiting = [last for last in waiting if last.stop > ends[done - 1]]


def rows_of(source: Chain, ids: np.ndarray, arrays: Arrays, about: dict[str, Any]) -> Embeddings:
    """Features with the paths, labels and splits of their images."""
    labels = splits = None
    if source.labels is not None:
        names = np.array([*source.classes, ""], dtype=str)
        assert UNLABELLED == -1  # the last of the names
        labels = names[source.labels[ids]]
    if len(source.sources) > 1:
        splits = np.array(["train", "test"])[[source.number(index) for index in ids.tolist()]]
    # Names that are not UTF-8 cannot be written into parquet.
    paths = [os.fsencode(source.path(index)).decode(errors="replace") for index in ids.tolist()]
    patches = arrays.get("patches")
    return Embeddings(paths, ids, arrays["features"], labels, splits, patches, about)


def _between(batches: list[Computed], start: int, stop: int, embedder: Embedder) -> Computed:
    """The rows of the positions from `start` to `stop`, of all batches."""
    dtype = np.dtype(embedder.recipe.dtype)
    arrays = {name: [np.zeros((0, *shape), dtype)] for name, shape in embedder.shapes.items()}
    positions, unreadable = [np.zeros(0, np.int64)], []
    for batch in batches:
        inside = (batch.positions >= start) & (batch.positions < stop)
        positions.append(batch.positions[inside])
        for name, values in batch.arrays.items():
            arrays[name].append(values[inside])
        unreadable += [(at, why) for at, why in batch.unreadable if start <= at < stop]
    joined = {name: np.concatenate(values) for name, values in arrays.items()}
    return Computed(np.concatenate(positions), joined, unreadable, stop)

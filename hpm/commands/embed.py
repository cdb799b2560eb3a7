"""`hpm embed`: write the features of images, one row per image.

Images are computed and saved shard by shard, so that an interrupted command goes on with those that
are missing. Processes share the shards; the main process joins them into the file at the end.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpm.commands.embedding_options import EmbedConfig
from hpm.commands.embedding_shards import Problems, Shard, Shards, compute_shards
from hpm.core import distributed, lock
from hpm.core.config import pair
from hpm.core.errors import UserError, counted
from hpm.core.options import AnyPath, make_config
from hpm.core.random_state import random_state_kept
from hpm.core.version import __version__
from hpm.core.wording import file_word
from hpm.data.chain import Chain, chain
from hpm.data.fingerprint import fingerprint
from hpm.data.given import named
from hpm.data.sources import open_source
from hpm.data.unreadable import UnreadableImages
from hpm.data.video.sources import holds_videos
from hpm.data.workers import num_workers
from hpm.evals.embedder import Embedder, Recipe
from hpm.evals.embeddings import KIND, Embeddings, format_to_write

Report = Callable[[str], None]
ComputeShards = Callable[[EmbedConfig, Shards, list[Shard]], Iterator[Problems]]


@dataclass(frozen=True)
class Embedded:
    """What was written: path, images, numbers per image, unreadable images and their list."""

    path: Path
    images: int
    dim: int
    unreadable: int
    unreadable_file: Path | None
    kind: str  # what a row is of: image or video

    def summary(self) -> str:
        """What was written, to print."""
        failed = counted(self.unreadable, self.kind)
        lines = [f"{failed} cannot be read: {self.unreadable_file}"] if self.unreadable_file else []
        made = f"{counted(self.images, self.kind)}, {self.dim} features each, in {self.path}"
        word = shlex.quote(str(self.path))
        then = f"hpm similar {word} {self.kind.upper()}, hpm show {word} --out page.html"
        return "\n".join([*lines, f"{made}: {then}"])


def embed(
    run: AnyPath,
    images: Any,
    out: AnyPath | None = None,
    report: Report = print,
    **options: Any,
) -> Embeddings:
    """The features of images.

    Args:
        run: what `hpm.load_encoder` takes.
        images: what `hpm.pretrain` takes as data; images of all splits are used.
        out: file or folder to write, see `EmbedConfig`. Without it, nothing is written.
        report: called with each line of text.
        options: those of `EmbedConfig`.

    Returns the paths, labels and features of all readable images, in order. Raises UserError if
    weights, images or file are of no use.
    """
    config = make_config(EmbedConfig, {"run": run, "images": named(images), "out": out} | options)
    if config.out is None:
        return _embed_in_memory(config, report)
    embedded = run_embed(config, report)
    return Embeddings.load(embedded.path, config.patches)


def run_embed(
    config: EmbedConfig, report: Report = print, compute: ComputeShards | None = None
) -> Embedded:
    """Embed as configured. Every process returns what all of them have written.

    compute: computes and saves shards, yielding the unreadable images of each when it is saved; by
        default in this process.
    """
    assert config.out is not None
    out = Path(config.out)
    format_to_write(out)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device), random_state_kept(device):
        embedder, source = open_embedder(config, device, report)
        about = _about(config, embedder, source)
        shards = Shards(out, source, about, config.shard_images)
        try:
            if distributed.main_first(shards.claim):
                if distributed.is_main():
                    report(f"{out} is complete already")
                return _written(shards)
            _compute(config, shards, report, compute or partial(compute_here, embedder))
            distributed.wait_for_all()
            return distributed.main_first(lambda: _finish(shards, config.max_unreadable))
        finally:
            lock.release(shards.folder)


def open_embedder(
    config: EmbedConfig, device: torch.device, report: Report
) -> tuple[Embedder, Chain]:
    """The encoder, and the images. Raises UserError."""
    recipe = Recipe(
        config.pool,
        config.teacher,
        None if config.image_size is None else pair(config.image_size),
        config.crop_share,
        config.precision,
        config.dtype,
        config.patches,
    )
    embedder = Embedder(config.run, recipe, device)
    if distributed.is_main():
        for note in embedder.notes:
            report(note)
    return embedder, chain(open_source(config.images, clips=embedder.sampling is not None))


def _about(config: EmbedConfig, embedder: Embedder, source: Chain) -> dict[str, Any]:
    """How the features are made, for the file."""
    prints = distributed.main_first(lambda: [fingerprint(part) for part in source.sources])
    return embedder.about | {
        "kind": KIND,
        "hpm": __version__,
        "run": _absolute(config.run),
        "data": _absolute(config.images),
        "images": len(source),
        "fingerprint": prints,
    }


def _absolute(path: str) -> str:
    """A path that stays valid in other folders; names that are no paths stay as they are."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


def compute_here(
    embedder: Embedder, config: EmbedConfig, shards: Shards, own: list[Shard]
) -> Iterator[Problems]:
    """Compute and save shards in this process."""
    workers = num_workers(config.workers)
    for shard, rows, problems in compute_shards(
        embedder, shards.source, own, config.batch_size, workers
    ):
        shards.save(shard, rows, problems)
        yield problems


def _compute(config: EmbedConfig, shards: Shards, report: Report, compute: ComputeShards) -> None:
    """Compute and save this process's share of the missing shards.

    Raises UserError as soon as this process knows of too many unreadable images.
    """
    missing = distributed.from_main(shards.missing())
    count = len(shards.all)
    if distributed.is_main() and len(missing) < count:
        report(f"going on: {count - len(missing)} of {count} shards are there")
    own = [shards.all[number] for number in missing[distributed.rank() :: distributed.world_size()]]
    known = distributed.main_first(lambda: len(shards.problems()))
    _check_unreadable(known, shards, config.max_unreadable)
    for problems in compute(config, shards, own):
        known += len(problems)
        _check_unreadable(known, shards, config.max_unreadable)


def _check_unreadable(count: int, shards: Shards, share: float) -> None:
    if count > share * len(shards.source):
        shards.list_problems()
        whole = counted(len(shards.source), file_word(holds_videos(shards.source)))
        raise UserError(
            f"{count} of {whole} cannot be read, more than max_unreadable {share}: repair or "
            f"remove those in {shards.unreadable_file}, or pass a larger --max-unreadable"
        )


def _finish(shards: Shards, max_unreadable: float) -> Embedded:
    """Join the shards into the result."""
    problems = shards.list_problems()
    _check_unreadable(len(problems), shards, max_unreadable)
    _check_any(len(shards.source), problems, shards.source)
    shards.finish(len(shards.source) - len(problems), len(problems))
    return _written(shards)


def _check_any(images: int, problems: list[tuple[int, str]], source: Chain) -> None:
    if len(problems) == images:
        index, problem = problems[0]
        first = f"the first, {source.path(index)}: {problem}"
        raise UserError(f"{source.name}: no readable {file_word(holds_videos(source))} ({first})")


def _written(shards: Shards) -> Embedded:
    about = shards.format.read_about(shards.out)
    listed = shards.unreadable_file if about["unreadable"] else None
    rows, dim, kind = about["rows"], about["features"][0], file_word(holds_videos(shards.source))
    return Embedded(shards.out, rows, dim, about["unreadable"], listed, kind)


def _embed_in_memory(config: EmbedConfig, report: Report) -> Embeddings:
    if distributed.world_size() > 1:
        raise UserError("several processes embed into a file: pass out")
    device = distributed.pick_device(config.device)
    with random_state_kept(device):
        embedder, source = open_embedder(config, device, report)
        about = _about(config, embedder, source)
        whole = [Shard(Path(), 0, len(source))]
        workers = num_workers(config.workers)
        ((_, rows, problems),) = compute_shards(embedder, source, whole, config.batch_size, workers)
    unreadable = UnreadableImages(source, config.max_unreadable)
    unreadable.add(problems)
    unreadable.check(report)
    _check_any(len(source), problems, source)
    rows.about = about | {"rows": len(rows), "unreadable": len(problems)}
    return rows

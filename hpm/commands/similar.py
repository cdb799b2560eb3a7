"""`hpm similar`: the images most similar to an image, and pairs of near-duplicates."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpm.commands.embedding_options import SimilarConfig
from hpm.core import distributed
from hpm.core.choices import TIMM
from hpm.core.errors import UserError, why
from hpm.core.random_state import random_state_kept
from hpm.data.chain import chain
from hpm.data.sources import Splits, open_source
from hpm.data.video.sources import VideoFiles
from hpm.evals.embedder import Embedder, Recipe
from hpm.evals.embeddings import Embeddings
from hpm.evals.similarity import (
    Bank,
    MostSimilar,
    nearest,
    nearest_in_index,
    open_index,
    similar_pairs,
)


@dataclass(frozen=True)
class Similar:
    """Rows of a list: similarity, then path and label, or two paths. `total`: pairs that there
    are, of which the list holds the most similar."""

    rows: list[tuple[float, str, str]]
    total: int


def run_similar(config: SimilarConfig) -> Similar:
    """Search as configured. Raises UserError on bad input."""
    if (config.image is None) == (config.duplicates is None):
        raise UserError("name an image to compare with, or pass --duplicates 0.95")
    path = Path(config.features).expanduser()
    embeddings = Embeddings.load(path)
    with random_state_kept():
        if config.duplicates is not None:
            return _duplicates(embeddings, config.duplicates, config)
        return _nearest(embeddings, path, config)


def embed_alike(
    image: str, about: dict[str, Any], run: str | None = None, device: str = "auto"
) -> np.ndarray:
    """The features [dim] of an image, made as those of a file whose `about` this is.

    Raises UserError if the weights are not those of the file.
    """
    if run is None:
        run = about["run"]
        if not Path(run).exists():
            is_timm = run.startswith(TIMM)
            reason = "are downloaded only when asked for" if is_timm else "are no longer there"
            raise UserError(
                f"the features are of {run}, whose weights {reason}: pass --run "
                f"{run if is_timm else 'with their place'}"
            )
    height, width = about["image_size"][-2:]
    recipe = Recipe(
        about["pool"],
        about["teacher"],
        (height, width),
        about["crop_share"],
        about["precision"],
        about["dtype"],
    )
    embedder = Embedder(run, recipe, distributed.pick_device(device))
    if embedder.weights != about["weights"]:
        raise UserError(
            f"the features were made with other weights (step {about['step']}) than {run} holds "
            f"now (step {embedder.step}): embed the images again, or name the weights with --run"
        )
    source = chain(_one_image(image, clip=about["clip"] is not None))
    (computed,) = embedder.batches(source, batch_size=1)
    if computed.unreadable:
        raise UserError(f"{image} cannot be read ({computed.unreadable[0][1]})")
    return computed.arrays["features"][0]


def _one_image(image: str, clip: bool) -> Splits:
    """An image file as a source; with `clip`, a video file or a folder of frames."""
    path = Path(image).expanduser()
    if clip and path.is_dir():
        return Splits(VideoFiles(image, [str(path)]))
    if not path.is_file():
        raise UserError(f"{image}: no such image")
    splits = open_source(image, clips=clip)
    if splits.test or len(splits.train) != 1:
        raise UserError(f"{image}: not one image")
    return splits


def _nearest(embeddings: Embeddings, path: Path, config: SimilarConfig) -> Similar:
    assert config.image is not None
    query = embed_alike(config.image, embeddings.about, config.run, config.device)
    count = config.count + 1  # the image may be among them
    bank = Bank(embeddings.features, config.centre)
    if config.approximate:
        kind = "centred" if config.centre else "plain"
        index = open_index(path.with_name(f"{path.name}.{kind}.faiss"), path, bank)
        found, values = nearest_in_index(index, bank, query, count)
    else:
        found, values = nearest(bank, query, count)
    itself = os.path.realpath(Path(config.image).expanduser())
    rows = [
        (float(value), embeddings.paths[row], _label(embeddings, row))
        for row, value in zip(found.tolist(), values.tolist(), strict=True)
        if os.path.realpath(embeddings.paths[row]) != itself
    ][: config.count]
    if config.out:
        with _table(config.out, ("similarity", "path", "label")) as table:
            table.writerows((f"{value:.6f}", *names) for value, *names in rows)
    return Similar(rows, len(rows))


def _duplicates(embeddings: Embeddings, threshold: float, config: SimilarConfig) -> Similar:
    best, total = MostSimilar(config.count), 0
    paths = embeddings.paths
    with contextlib.ExitStack() as stack:
        table = None
        if config.out:
            table = stack.enter_context(_table(config.out, ("similarity", "path", "other")))
        bank = Bank(embeddings.features, config.centre)
        device = distributed.pick_device(config.device)
        for first, second, values in similar_pairs(bank, threshold, device):
            best.add(first, second, values)
            total += len(first)
            if table:
                triples = zip(values.tolist(), first.tolist(), second.tolist(), strict=True)
                table.writerows((f"{v:.6f}", paths[a], paths[b]) for v, a, b in triples)
    return Similar([(value, paths[a], paths[b]) for a, b, value in best.pairs], total)


def _label(embeddings: Embeddings, row: int) -> str:
    return "" if embeddings.labels is None else str(embeddings.labels[row])


@contextlib.contextmanager
def _table(out: str, columns: tuple[str, ...]) -> Iterator[Any]:
    """A CSV file to write rows into. It exists only when it is complete."""
    path = Path(out)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(columns)
            yield writer
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {why(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)

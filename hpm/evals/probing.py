"""Probes: small heads trained on frozen features, for a whole grid of hyper-parameters at once.

Two copies of every head are trained in the same pass over the features. One is trained without a
fifth of each class, on which the hyper-parameters are then chosen; the other is trained on all
images and tested. Only the chosen heads are tested. A grid that needs too much memory is trained
in several passes, with the same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.precision import to_float64
from hpm.core.progress import track
from hpm.data.loader import Batch, MakeView, evaluation_views, training_loader, view_keys
from hpm.data.sources import Source
from hpm.data.unreadable import UnreadableImages
from hpm.data.workers import num_workers
from hpm.evals.contract import RAW_PIXELS, Measured
from hpm.evals.features import Embed, Features, ImageReader, check_finite, no_features
from hpm.evals.metrics import TrueClassRanks, join, mean_probabilities, rank
from hpm.models.seeds import seeded
from hpm.training.optim import learning_rate

SMALLEST_BATCH = 32
CHOOSING, TESTED = 0, 1  # the two copies of every head
FLOAT32 = 4  # bytes
Rows = tuple[dict[str, Tensor], Tensor, Tensor]  # features of each kind, labels, ids


@runtime_checkable
class Bank(Protocol):
    """Batches of features of a data set by id, from memory or computed on the fly. With several
    views of each image, a batch has as many consecutive rows of features per label."""

    labels: Int[Tensor, " images"]
    views: int

    def batches(self, steps: Sequence[Tensor], epoch: int = 0) -> Iterator[Rows]: ...


class Cached:
    """Precomputed features in memory."""

    def __init__(self, found: dict[str, Features]):
        self.found = found
        first = next(iter(found.values()))
        self.labels, self.views = first.labels, first.views

    def batches(self, steps: Sequence[Tensor], epoch: int = 0) -> Iterator[Rows]:
        for ids in steps:
            rows = {name: features.rows(ids) for name, features in self.found.items()}
            yield rows, self.labels[ids], ids


class Computed:
    """Features computed on the fly, for augmented views or to save memory.

    A batch is loaded and embedded in pieces of the reader's batch size. Processes share the work of
    each batch, and all receive the whole batch. Unreadable images are dropped or, with `stand_in`
    (for training), replaced. The view is one of evaluation, of which the reader's grid has several,
    unless `make_view` is another.
    """

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        size: tuple[int, int],
        channels: int,
        embed: Embed,
        reader: ImageReader,
        unreadable: UnreadableImages,
        make_view: MakeView | None = None,
        stand_in: bool = False,
    ):
        self.source, self.embed, self.reader = source, embed, reader
        self.stand_in, self.unreadable = stand_in, unreadable
        self.shape, self.channels = reader.shape(size), channels
        self.views = 1 if make_view else reader.grid.count
        self.make_view = make_view or evaluation_views(
            size, channels, reader.crop_share, reader.sampling, reader.grid
        )
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))

    def batches(self, steps: Sequence[Tensor], epoch: int = 0) -> Iterator[Rows]:
        own = slice(distributed.rank(), None, distributed.world_size())
        at_once = max(1, self.reader.batch_size // self.views)
        pieces = [ids[own].split(at_once) for ids in steps]
        keys = (view_keys(epoch, ids.tolist(), self.views) for step in pieces for ids in step)
        workers = num_workers(self.reader.workers)
        loaded = iter(
            training_loader(self.source, self.make_view, keys, workers, False, self.stand_in)
        )
        for step in pieces:
            rows, indices = self._embedded(islice(loaded, len(step)))
            ids = distributed.rows_of_all(indices)
            if not len(ids):
                raise UserError(f"{self.source.name}: no readable image")
            whole = {name: distributed.rows_of_all(features) for name, features in rows.items()}
            labels = self.labels[ids]
            check_finite({n: Features(f, labels, self.views) for n, f in whole.items()})
            yield whole, labels, ids
        self.unreadable.check(self.reader.report)

    def _embedded(self, pieces: Iterable[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """(features of each kind, ids) of the readable images of all pieces."""
        found, indices = [], []
        for piece in pieces:
            images, readable = piece.complete(self.views)
            if len(images):
                found.append({name: f.float().cpu() for name, f in self.embed(images).items()})
            indices.append(readable)
            self.unreadable.add(piece.unreadable)
        found = found or [no_features(self.embed, self.shape, self.channels)]
        rows = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        return rows, torch.cat(indices)


@dataclass(frozen=True)
class HyperParameters:
    """One point of the grid."""

    lr: float
    weight_decay: float


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[HyperParameters]:
    return [HyperParameters(lr, decay) for lr, decay in product(lrs, weight_decays)]


class Heads(nn.Module):
    """Two copies of a head for each point of the grid, trained together.

    Args:
        feature_shape: of one image.
        num_classes: C.
        grid: hyper-parameters of each head.
        batch_size: images per step.

    Maps features [B ...] to logits [grid 2 B C].
    """

    @staticmethod
    def memory(feature_shape: torch.Size, num_classes: int, batch_size: int) -> int:
        """Bytes that one point of the grid needs while it is trained."""
        raise NotImplementedError

    def learn(self, features: Tensor, labels: Tensor, seen: Tensor, rate: float) -> None:
        """One step at `rate` times each head's learning rate. The CHOOSING copies learn only from
        the images in `seen`."""
        raise NotImplementedError


@dataclass
class Probed:
    """Result of a probe: the rank of the true class of each test image, and the chosen
    hyper-parameters."""

    ranks: TrueClassRanks
    hyper_parameters: HyperParameters
    held_out_top1: float

    def measured(self, features: str) -> Measured:
        """Convert to a row of an evaluation."""
        chosen = dataclasses.asdict(self.hyper_parameters) | {"held_out_top1": self.held_out_top1}
        return Measured(features, scores=self.ranks, chosen=chosen)


def rows(found: dict[str, Probed]) -> Iterator[Measured]:
    """The rows of an evaluation, raw pixels last."""
    for name in sorted(found, key=lambda name: name == RAW_PIXELS):
        yield found[name].measured(name)


@dataclass(frozen=True)
class Recipe:
    """How heads are trained. Learning rates start at the grid's and follow a cosine decay.

    heads_gb: memory for the heads that are trained together. With many classes, the grid is
        trained in several passes.
    """

    heads: type[Heads]
    grid: list[HyperParameters]
    epochs: int
    batch_size: int
    seed: int
    device: torch.device
    heads_gb: float


def probe(
    train: Bank,
    held_out: Bank,
    test: Bank,
    held: np.ndarray,
    num_classes: int,
    recipe: Recipe,
) -> dict[str, Probed]:
    """Train probes on every kind of features of the banks, choose hyper-parameters, and test.

    held: ids of the training images on which hyper-parameters are chosen. held_out: bank of their
    features (`train`, or one without augmentation).

    Raises UserError if no head of the grid has a finite loss on these images.
    """
    best: dict[str, _Scored] = {}
    left = recipe.grid
    while left:
        count, found = _probe_some(train, held_out, test, held, num_classes, left, recipe)
        left = left[count:]
        for name, scored in found.items():
            if name not in best or scored.score > best[name].score:
                best[name] = scored
    for name, scored in best.items():
        if scored.score == -torch.inf:
            raise UserError(f"the probe of {name} diverges at every learning rate: lower --lr")
    return {name: scored.probed for name, scored in best.items()}


@dataclass(frozen=True)
class _Scored:
    """The best of some points of the grid, and the score by which points are compared."""

    probed: Probed
    score: float


def _probe_some(
    train: Bank,
    held_out: Bank,
    test: Bank,
    held: np.ndarray,
    num_classes: int,
    points: Sequence[HyperParameters],
    recipe: Recipe,
) -> tuple[int, dict[str, _Scored]]:
    """Probe the first of the points, as many as there is memory for: (their number, the best of
    them for each kind of features)."""
    heads, points = _train(train, held, num_classes, points, recipe)
    right = {name: torch.zeros(len(points), dtype=torch.float64) for name in heads}
    losses = {name: torch.zeros(len(points), dtype=torch.float64) for name in heads}
    for name, logits, labels in _logits(heads, held_out, torch.from_numpy(held), recipe):
        chosen_by = logits[:, CHOOSING]
        right[name] += (chosen_by.argmax(-1) == labels).sum(1).cpu()
        expected = labels.expand(len(points), -1).flatten()
        entropy = F.cross_entropy(chosen_by.flatten(0, 1), expected, reduction="none")
        losses[name] += to_float64(entropy).view(len(points), -1).sum(1).cpu()
    # Break ties of accuracy, which are common on small data, by the loss.
    scores = {
        name: torch.where(losses[name].isfinite(), right[name] - losses[name] / 1e9, -torch.inf)
        for name in heads
    }
    best = {name: int(scores[name].argmax()) for name in heads}
    ranks: dict[str, list[TrueClassRanks]] = {name: [] for name in heads}
    for name, logits, labels in _logits(heads, test, torch.arange(len(test.labels)), recipe):
        ranks[name].append(rank(mean_probabilities(logits[best[name], TESTED], test.views), labels))
    found = {}
    for name, index in best.items():
        held_out_top1 = 100 * float(right[name][index]) / len(held)
        probed = Probed(join(ranks[name]), points[index], held_out_top1)
        found[name] = _Scored(probed, float(scores[name][index]))
    return len(points), found


def _train(
    bank: Bank,
    held: np.ndarray,
    num_classes: int,
    points: Sequence[HyperParameters],
    recipe: Recipe,
) -> tuple[dict[str, Heads], Sequence[HyperParameters]]:
    """Heads by kind of features, for as many of the points as there is memory for, and these."""
    count = len(bank.labels)
    batch_size = min(recipe.batch_size, max(SMALLEST_BATCH, count // 16), count)
    steps_per_epoch = count // batch_size
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[torch.from_numpy(held)] = True
    total = recipe.epochs * steps_per_epoch
    done = len(recipe.grid) - len(points)
    title = f"probes ({done} of {len(recipe.grid)} done)" if done else "probes"
    heads: dict[str, Heads] = {}
    for epoch in track(range(recipe.epochs), title):
        order = np.random.default_rng([recipe.seed, epoch]).permutation(count)
        steps = torch.from_numpy(order).split(batch_size)[:steps_per_epoch]
        for step, (rows, labels, ids) in enumerate(bank.batches(steps, epoch)):
            if not heads:
                shapes = {name: features.shape[1:] for name, features in rows.items()}
                points = points[: _how_many(shapes, num_classes, batch_size, recipe)]
                heads = _new_heads(shapes, num_classes, points, recipe, batch_size)
            rate = learning_rate(epoch * steps_per_epoch + step, total, 0, 1.0)
            labels = labels.to(recipe.device)
            seen = (~is_held[ids]).to(recipe.device)
            for name, head in heads.items():
                head.learn(rows[name].to(recipe.device), labels, seen, rate)
    return heads, points


def _how_many(
    shapes: dict[str, torch.Size], num_classes: int, batch_size: int, recipe: Recipe
) -> int:
    """Points of the grid that are trained together: as many as there is memory for."""
    memory = (recipe.heads.memory(shape, num_classes, batch_size) for shape in shapes.values())
    return max(1, int(recipe.heads_gb * 1e9 / sum(memory)))


def _new_heads(
    shapes: dict[str, torch.Size],
    num_classes: int,
    points: Sequence[HyperParameters],
    recipe: Recipe,
    batch_size: int,
) -> dict[str, Heads]:
    with seeded(recipe.seed):
        return {
            name: recipe.heads(shape, num_classes, points, batch_size).to(recipe.device)
            for name, shape in shapes.items()
        }


@torch.inference_mode()
def _logits(
    heads: dict[str, Heads], bank: Bank, ids: Tensor, recipe: Recipe
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(kind of features, logits [grid 2 rows C], labels [B]) for the given images in order."""
    for rows, labels, _ in bank.batches(ids.split(max(1, 512 // bank.views))):
        for name, head in heads.items():
            logits = head.eval()(rows[name].to(recipe.device))
            yield name, logits, labels.to(recipe.device)

"""Probes: small heads trained on frozen features, for a whole grid of hyper-parameters at once.

Two copies of every head are trained in the same pass over the features. One is trained without a
fifth of each class, on which the hyper-parameters are then chosen; the other is trained on all
images and tested. Only the chosen heads are tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.data.loader import MakeView, evaluation_views, training_loader, view_keys
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

    Processes share the work of each batch, and all receive the whole batch. Unreadable images are
    dropped or, with `stand_in` (for training), replaced. The view is one of evaluation, of which
    the reader's grid has several, unless `make_view` is another.
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
        keys = (view_keys(epoch, ids[own].tolist(), self.views) for ids in steps)
        workers = num_workers(self.reader.workers)
        for batch in training_loader(
            self.source, self.make_view, keys, workers, False, self.stand_in
        ):
            images, indices = batch.complete(self.views)
            if len(images):
                rows = {name: f.float().cpu() for name, f in self.embed(images).items()}
            else:
                rows = no_features(self.embed, self.shape, self.channels)
            self.unreadable.add(batch.unreadable)
            ids = distributed.rows_of_all(indices)
            if not len(ids):
                raise UserError(f"{self.source.name}: no readable image")
            whole = {name: distributed.rows_of_all(features) for name, features in rows.items()}
            labels = self.labels[ids]
            check_finite({n: Features(f, labels, self.views) for n, f in whole.items()})
            yield whole, labels, ids
        self.unreadable.check(self.reader.report)


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
    """How heads are trained. Learning rates start at the grid's and follow a cosine decay."""

    heads: type[Heads]
    grid: list[HyperParameters]
    epochs: int
    batch_size: int
    seed: int
    device: torch.device


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
    """
    heads = _train(train, held, num_classes, recipe)
    count = len(recipe.grid)
    right = {name: torch.zeros(count, dtype=torch.float64) for name in heads}
    losses = {name: torch.zeros(count, dtype=torch.float64) for name in heads}
    for name, logits, labels in _logits(heads, held_out, torch.from_numpy(held), recipe):
        chosen_by = logits[:, CHOOSING]
        right[name] += (chosen_by.argmax(-1) == labels).sum(1).cpu()
        expected = labels.expand(count, -1).flatten()
        entropy = F.cross_entropy(chosen_by.flatten(0, 1), expected, reduction="none").double()
        losses[name] += entropy.view(count, -1).sum(1).cpu()
    best = {}
    for name in heads:
        # Break ties of accuracy, which are common on small data, by the loss.
        order = torch.where(losses[name].isfinite(), right[name] - losses[name] / 1e9, -torch.inf)
        best[name] = int(order.argmax())
    ranks: dict[str, list[TrueClassRanks]] = {name: [] for name in heads}
    for name, logits, labels in _logits(heads, test, torch.arange(len(test.labels)), recipe):
        scores = mean_probabilities(logits[best[name], TESTED], test.views)
        ranks[name].append(rank(scores, labels))
    return {
        name: Probed(
            join(ranks[name]),
            recipe.grid[best[name]],
            100 * float(right[name][best[name]]) / len(held),
        )
        for name in heads
    }


def _train(bank: Bank, held: np.ndarray, num_classes: int, recipe: Recipe) -> dict[str, Heads]:
    count = len(bank.labels)
    batch_size = min(recipe.batch_size, max(SMALLEST_BATCH, count // 16), count)
    steps_per_epoch = count // batch_size
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[torch.from_numpy(held)] = True
    total = recipe.epochs * steps_per_epoch
    heads: dict[str, Heads] = {}
    for epoch in track(range(recipe.epochs), "probes"):
        order = np.random.default_rng([recipe.seed, epoch]).permutation(count)
        steps = torch.from_numpy(order).split(batch_size)[:steps_per_epoch]
        for step, (rows, labels, ids) in enumerate(bank.batches(steps, epoch)):
            if not heads:
                heads = _new_heads(rows, num_classes, recipe, batch_size)
            rate = learning_rate(epoch * steps_per_epoch + step, total, 0, 1.0)
            labels = labels.to(recipe.device)
            seen = (~is_held[ids]).to(recipe.device)
            for name, head in heads.items():
                head.learn(rows[name].to(recipe.device), labels, seen, rate)
    return heads


def _new_heads(
    rows: dict[str, Tensor], num_classes: int, recipe: Recipe, batch_size: int
) -> dict[str, Heads]:
    with seeded(recipe.seed):
        return {
            name: recipe.heads(f.shape[1:], num_classes, recipe.grid, batch_size).to(recipe.device)
            for name, f in rows.items()
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

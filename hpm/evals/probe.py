"""Probes: small heads trained on frozen features, a whole grid of settings at the same time.

Every head comes twice, side by side in one pass over the features: once trained without a fifth of
each class, which then chooses the setting, and once trained on all, which is what gets tested. The
test set is looked at once, by the heads of the chosen setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm import distributed
from hpm.data.loader import EvaluationViews, TrainingViews, training_loader
from hpm.data.sources import Source
from hpm.errors import UserError
from hpm.evals.features import Embed, Features, check_finite, no_features
from hpm.evals.metrics import Ranked, join, rank
from hpm.logs import track
from hpm.optim import learning_rate

SMALLEST_BATCH = 32
CHOOSING, TESTED = 0, 1  # the two copies of every head
Rows = tuple[dict[str, Tensor], Tensor, Tensor]  # features of each kind, labels, ids


@runtime_checkable
class Bank(Protocol):
    """Features of a data set by id, in batches: from memory, or computed when asked for."""

    labels: Int[Tensor, " images"]

    def batches(self, steps: Sequence[Tensor], epoch: int = 0) -> Iterator[Rows]: ...


class Cached:
    """Features that were computed once and are held in memory."""

    def __init__(self, found: dict[str, Features]):
        self.found = found
        self.labels = next(iter(found.values())).labels

    def batches(self, steps: Sequence[Tensor], epoch: int = 0) -> Iterator[Rows]:
        for ids in steps:
            rows = {name: features.features[ids] for name, features in self.found.items()}
            yield rows, self.labels[ids], ids


class Computed:
    """Features computed anew each time: of augmented views, or because memory would not hold them.

    Several processes share each batch; all of them get the whole. Images that cannot be read are
    left out, or (`stand_in`, for training) replaced by others.
    """

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        make_view: TrainingViews | EvaluationViews,
        embed: Embed,
        workers: int,
        stand_in: bool = False,
    ):
        self.stand_in = stand_in
        self.source, self.make_view, self.embed, self.workers = source, make_view, embed, workers
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))

    def batches(self, steps: Sequence[Tensor], epoch: int = 0) -> Iterator[Rows]:
        own = slice(distributed.rank(), None, distributed.world_size())
        keys = [[(epoch, int(i)) for i in ids[own]] for ids in steps]
        for batch in training_loader(
            self.source, self.make_view, keys, self.workers, False, self.stand_in
        ):
            if len(batch.images):
                rows = {name: f.float().cpu() for name, f in self.embed(batch.images).items()}
            else:
                rows = no_features(self.embed, self.make_view.size, self.make_view.channels)
            ids = distributed.rows_of_all(batch.indices)
            if not len(ids):
                raise UserError(f"{self.source.name}: no readable image")
            whole = {name: distributed.rows_of_all(features) for name, features in rows.items()}
            check_finite({n: Features(f, self.labels[ids]) for n, f in whole.items()})
            yield whole, self.labels[ids], ids


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    lr: float
    weight_decay: float


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[Setting]:
    return [Setting(lr, decay) for lr, decay in product(lrs, weight_decays)]


class LinearHeads(nn.Module):
    """Batch normalisation without scale and shift, then a linear layer for every setting, twice."""

    def __init__(self, feature_shape: torch.Size, num_classes: int, settings: int):
        super().__init__()
        (dim,) = feature_shape
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, momentum=None, affine=False)
        self.num_classes = num_classes
        self.weights = nn.ParameterList(torch.zeros(dim, 2 * num_classes) for _ in range(settings))
        self.biases = nn.ParameterList(torch.zeros(2 * num_classes) for _ in range(settings))

    def of_setting(self, setting: int) -> list[nn.Parameter]:
        return [self.weights[setting], self.biases[setting]]

    def forward(
        self, features: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "settings 2 batch classes"]:
        # One matrix product for all heads: far faster than a batch of narrow ones.
        weight, bias = torch.cat(list(self.weights), 1), torch.cat(list(self.biases))
        logits = torch.addmm(bias, self.norm(features), weight)
        return logits.view(len(features), -1, 2, self.num_classes).permute(1, 2, 0, 3)

    @staticmethod
    def peak(lr: float, batch_size: int) -> float:
        return lr * batch_size / 256

    @staticmethod
    def optimizer(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


class AttentiveHeads(nn.Module):
    """Batch normalisation without scale and shift, cross-attention of one learned query to the
    patches, then a linear layer; for every setting, twice.

    As in recent work on masked image models, whose patches hold what their mean does not. A single
    query needs neither keys nor values of the patches: its product with a key is a product of the
    patch with a vector (the key's bias would add the same to all patches), and a mean of values is
    the value of a mean. So each head costs two products per patch and not two matrices.
    """

    def __init__(self, feature_shape: torch.Size, num_classes: int, settings: int):
        super().__init__()
        _, dim = feature_shape
        heads = max(1, dim // 64)
        head_dim = dim // heads
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, momentum=None, affine=False)
        projection = torch.empty(2, heads, head_dim, dim).uniform_(-(dim**-0.5), dim**-0.5)
        output = torch.empty(num_classes, heads * head_dim)
        output.uniform_(-((heads * head_dim) ** -0.5), (heads * head_dim) ** -0.5)
        start = {
            "query": 0.02 * torch.randn(heads, head_dim),
            "key": projection[0],
            "value": projection[1],
            "value_bias": torch.zeros(heads, head_dim),
            "output": output,
            "output_bias": torch.zeros(num_classes),
        }
        # [2, ...] each: both copies of a head start alike.
        self.parts = nn.ModuleList(
            nn.ParameterDict({name: torch.stack([t, t]) for name, t in start.items()})
            for _ in range(settings)
        )

    def of_setting(self, setting: int) -> list[nn.Parameter]:
        return list(self.parts[setting].parameters())

    def forward(
        self, features: Float[Tensor, "batch patches dim"]
    ) -> Float[Tensor, "settings 2 batch classes"]:
        patches = self.norm(features.transpose(1, 2)).transpose(1, 2)
        query, key, value, value_bias, output, output_bias = (
            torch.stack([part[name] for part in self.parts])  # type: ignore[index]
            for name in ("query", "key", "value", "value_bias", "output", "output_bias")
        )
        seeking = torch.einsum("schd,schde->sche", query, key) / query.shape[-1] ** 0.5
        settings, copies, heads, dim = seeking.shape
        weights = (patches @ seeking.view(-1, dim).T).softmax(1)
        means = (weights.transpose(1, 2) @ patches).view(-1, settings, copies, heads, dim)
        pooled = torch.einsum("bsche,schde->scbhd", means, value) + value_bias[:, :, None]
        return pooled.flatten(3) @ output.transpose(2, 3) + output_bias[:, :, None]

    @staticmethod
    def peak(lr: float, batch_size: int) -> float:
        return lr  # the steps of AdamW have a length of their own

    @staticmethod
    def optimizer(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups)


@dataclass
class Probed:
    """What a probe found: where the true class of each test image stands, and how it was chosen."""

    ranked: Ranked
    setting: Setting
    held_out_top1: float


@dataclass(frozen=True)
class Recipe:
    """How heads are trained: AdamW or SGD with the settings' rates falling by half a cosine."""

    heads: type[LinearHeads] | type[AttentiveHeads]
    settings: list[Setting]
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
    """Train, choose and test a probe on every kind of features of the banks.

    `held` are ids of the training images that choose the setting; `held_out` is the bank that
    gives their features (that of `train`, or one without augmentation).
    """
    heads = _train(train, held, num_classes, recipe)
    count = len(recipe.settings)
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
        # Equal accuracies are common on small data; the likelihood tells them apart.
        order = torch.where(losses[name].isfinite(), right[name] - losses[name] / 1e9, -torch.inf)
        best[name] = int(order.argmax())
    ranked: dict[str, list[Ranked]] = {name: [] for name in heads}
    for name, logits, labels in _logits(heads, test, torch.arange(len(test.labels)), recipe):
        ranked[name].append(rank(logits[best[name], TESTED], labels))
    return {
        name: Probed(
            join(ranked[name]), recipe.settings[best[name]],
            100 * float(right[name][best[name]]) / len(held),
        )
        for name in heads
    }  # fmt: skip


def _train(
    bank: Bank, held: np.ndarray, num_classes: int, recipe: Recipe
) -> dict[str, LinearHeads | AttentiveHeads]:
    count = len(bank.labels)
    batch_size = min(recipe.batch_size, max(SMALLEST_BATCH, count // 16), count)
    steps_per_epoch = count // batch_size
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[torch.from_numpy(held)] = True
    heads: dict[str, LinearHeads | AttentiveHeads] = {}
    optimizer: torch.optim.Optimizer | None = None
    for epoch in track(range(recipe.epochs), "probes"):
        order = np.random.default_rng([recipe.seed, epoch]).permutation(count)
        steps = torch.from_numpy(order).split(batch_size)[:steps_per_epoch]
        for step, (rows, labels, ids) in enumerate(bank.batches(steps, epoch)):
            if optimizer is None:
                heads = _new_heads(rows, num_classes, recipe)
                optimizer = recipe.heads.optimizer(_groups(heads, recipe, batch_size))
            progress = epoch * steps_per_epoch + step
            for group in optimizer.param_groups:
                total = recipe.epochs * steps_per_epoch
                group["lr"] = learning_rate(progress, total, 0, group["peak"])
            labels = labels.to(recipe.device)
            seen = (~is_held[ids]).to(recipe.device)
            loss = torch.zeros((), device=recipe.device)
            for name, head in heads.items():
                logits = head(rows[name].to(recipe.device))
                loss = loss + _loss(logits, labels, seen)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return heads


def _loss(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Sum over heads of their mean cross-entropy [settings 2 B C]; heads share no weights."""
    settings, copies, batch, _ = logits.shape
    expected = labels.repeat(settings * copies)
    entropy = F.cross_entropy(logits.flatten(0, 2), expected, reduction="none")
    entropy = entropy.view(settings, copies, batch)
    choosing = (entropy[:, CHOOSING] * seen).sum() / seen.sum().clamp(min=1)
    return choosing + entropy[:, TESTED].mean(1).sum()


def _new_heads(
    rows: dict[str, Tensor], num_classes: int, recipe: Recipe
) -> dict[str, LinearHeads | AttentiveHeads]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return {
            name: recipe.heads(f.shape[1:], num_classes, len(recipe.settings)).to(recipe.device)
            for name, f in rows.items()
        }


def _groups(
    heads: dict[str, LinearHeads | AttentiveHeads], recipe: Recipe, batch_size: int
) -> list[dict]:
    return [
        {
            "params": [p for head in heads.values() for p in head.of_setting(number)],
            "peak": recipe.heads.peak(setting.lr, batch_size),
            "lr": 0.0,
            "weight_decay": setting.weight_decay,
        }
        for number, setting in enumerate(recipe.settings)
    ]


@torch.inference_mode()
def _logits(
    heads: dict[str, LinearHeads | AttentiveHeads], bank: Bank, ids: Tensor, recipe: Recipe
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(kind of features, logits [settings 2 B C], labels [B]) for the given images in order."""
    for rows, labels, _ in bank.batches(ids.split(512)):
        for name, head in heads.items():
            logits = head.eval()(rows[name].to(recipe.device))
            yield name, logits, labels.to(recipe.device)

"""Probes: small heads trained on frozen features, a whole grid of settings at the same time.

Every head comes twice, side by side in one pass over the features: once trained without a fifth of
each class, which then chooses the setting, and once trained on all, which is what gets tested. The
test set is looked at once, by the heads of the chosen setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.data.loader import EvaluationViews, TrainingViews, training_loader
from hpm.data.sources import Source
from hpm.data.unreadable import UnreadableImages
from hpm.evals.features import Embed, Features, check_finite, no_features
from hpm.evals.metrics import Ranked, join, rank
from hpm.models.linear import linear
from hpm.training.optim import learning_rate

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
        unreadable: UnreadableImages,
        report: Callable[[str], None],
        stand_in: bool = False,
    ):
        self.stand_in, self.unreadable, self.report = stand_in, unreadable, report
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
            self.unreadable.add(batch.unreadable)
            ids = distributed.rows_of_all(batch.indices)
            if not len(ids):
                raise UserError(f"{self.source.name}: no readable image")
            whole = {name: distributed.rows_of_all(features) for name, features in rows.items()}
            check_finite({n: Features(f, self.labels[ids]) for n, f in whole.items()})
            yield whole, self.labels[ids], ids
        self.unreadable.check(self.report)


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    lr: float
    weight_decay: float


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[Setting]:
    return [Setting(lr, decay) for lr, decay in product(lrs, weight_decays)]


class LinearHeads(nn.Module):
    """Batch normalisation without scale and shift, then a linear layer for every setting, twice.

    Trained by stochastic gradient descent with Nesterov momentum. Most of the time goes into
    products and the softmax of [batch, heads * classes], so the gradient of the cross-entropy is
    written down instead of recorded, and each large array is made once.

    Args:
        feature_shape: [D] of one image.
        num_classes: C.
        settings: of the grid; its rates are per 256 images.
        batch_size: images per step.
    """

    MOMENTUM = 0.9
    weight: Tensor
    bias: Tensor
    weight_velocity: Tensor
    bias_velocity: Tensor
    peak: Tensor
    weight_decay: Tensor

    def __init__(
        self, feature_shape: torch.Size, num_classes: int, settings: Sequence[Setting],
        batch_size: int,
    ):  # fmt: skip
        super().__init__()
        (dim,) = feature_shape
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, momentum=None, affine=False)
        self.shape = (2, len(settings), num_classes)
        outputs = 2 * len(settings) * num_classes

        def per_output(values: list[float]) -> Tensor:
            return torch.tensor(values)[None, :, None].expand(self.shape).reshape(outputs)

        self.register_buffer("weight", torch.zeros(outputs, dim))
        self.register_buffer("bias", torch.zeros(outputs))
        self.register_buffer("weight_velocity", torch.zeros(outputs, dim))
        self.register_buffer("bias_velocity", torch.zeros(outputs))
        self.register_buffer("peak", per_output([s.lr * batch_size / 256 for s in settings]))
        self.register_buffer("weight_decay", per_output([s.weight_decay for s in settings]))
        self._probabilities = torch.empty(0)

    def forward(
        self, features: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "settings 2 batch classes"]:
        logits = linear(self.norm(features), self.weight, self.bias)
        return logits.view(len(features), *self.shape).permute(2, 1, 0, 3)

    @torch.no_grad()
    def learn(
        self,
        features: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        seen: Bool[Tensor, " batch"],
        rate: float,
    ) -> None:
        """One step at `rate` times each setting's own; `seen` are the images that the choosing
        copies may learn from."""
        normed = self.norm(features)
        error = self._softmax(linear(normed, self.weight, self.bias))
        index = labels[:, None, None].expand(-1, error.shape[1], 1)
        error.scatter_add_(2, index, error.new_full((1,), -1.0).expand_as(index))
        error = error.view(len(features), -1)
        half = error.shape[1] // 2
        share = {
            CHOOSING: seen.to(features.dtype) / seen.sum().clamp(min=1),
            TESTED: torch.full_like(features[:, 0], 1 / len(features)),
        }
        for copy, weights in share.items():
            rows = slice(copy * half, (copy + 1) * half)
            gradient = error[:, rows].T @ (normed * weights[:, None])
            step = rate * self.peak[rows]
            self._descend(
                self.weight[rows], gradient, self.weight_velocity[rows],
                step[:, None], self.weight_decay[rows, None],
            )  # fmt: skip
            self._descend(
                self.bias[rows], weights @ error[:, rows], self.bias_velocity[rows], step,
                self.weight_decay[rows],
            )  # fmt: skip

    def _softmax(self, logits: Tensor) -> Tensor:
        """[batch, heads, classes], in memory that the next step uses again."""
        logits = logits.view(len(logits), -1, self.shape[2])
        if self._probabilities.shape != logits.shape:
            self._probabilities = torch.empty_like(logits)
        return torch.softmax(logits, -1, out=self._probabilities)

    def _descend(
        self, parameter: Tensor, gradient: Tensor, velocity: Tensor, step: Tensor, decay: Tensor
    ) -> None:
        """As torch.optim.SGD with Nesterov momentum and weight decay."""
        gradient.addcmul_(decay.expand_as(parameter), parameter)
        velocity.mul_(self.MOMENTUM).add_(gradient)
        parameter.sub_(step * (gradient + self.MOMENTUM * velocity))


class AttentiveHeads(nn.Module):
    """Batch normalisation without scale and shift, cross-attention of one learned query to the
    patches, then a linear layer; for every setting, twice.

    As in recent work on masked image models, whose patches hold what their mean does not. A single
    query needs neither keys nor values of the patches: its product with a key is a product of the
    patch with a vector (the key's bias would add the same to all patches), and a mean of values is
    the value of a mean. So each head costs two products per patch and not two matrices.
    """

    def __init__(
        self, feature_shape: torch.Size, num_classes: int, settings: Sequence[Setting],
        batch_size: int,
    ):  # fmt: skip
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
            for _ in settings
        )
        self.settings = settings
        self._optimizer: torch.optim.Optimizer | None = None

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

    def learn(
        self,
        features: Float[Tensor, "batch patches dim"],
        labels: Int[Tensor, " batch"],
        seen: Bool[Tensor, " batch"],
        rate: float,
    ) -> None:
        """See `LinearHeads.learn`."""
        if self._optimizer is None:  # now that the heads are where they stay
            self._optimizer = torch.optim.AdamW(
                {"params": list(part.parameters()), "lr": 0.0, "weight_decay": setting.weight_decay}
                for part, setting in zip(self.parts, self.settings, strict=True)
            )
        for group, setting in zip(self._optimizer.param_groups, self.settings, strict=True):
            group["lr"] = rate * setting.lr  # AdamW's steps do not follow the batch size
        _loss(self(features), labels, seen).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


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
    total = recipe.epochs * steps_per_epoch
    heads: dict[str, LinearHeads | AttentiveHeads] = {}
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


def _loss(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Sum over heads of their mean cross-entropy [settings 2 B C]; heads share no weights."""
    settings, copies, batch, _ = logits.shape
    expected = labels.repeat(settings * copies)
    entropy = F.cross_entropy(logits.flatten(0, 2), expected, reduction="none")
    entropy = entropy.view(settings, copies, batch)
    choosing = (entropy[:, CHOOSING] * seen).sum() / seen.sum().clamp(min=1)
    return choosing + entropy[:, TESTED].mean(1).sum()


def _new_heads(
    rows: dict[str, Tensor], num_classes: int, recipe: Recipe, batch_size: int
) -> dict[str, LinearHeads | AttentiveHeads]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return {
            name: recipe.heads(f.shape[1:], num_classes, recipe.settings, batch_size).to(
                recipe.device
            )
            for name, f in rows.items()
        }


@torch.inference_mode()
def _logits(
    heads: dict[str, LinearHeads | AttentiveHeads], bank: Bank, ids: Tensor, recipe: Recipe
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(kind of features, logits [settings 2 B C], labels [B]) for the given images in order."""
    for rows, labels, _ in bank.batches(ids.split(512)):
        for name, head in heads.items():
            logits = head.eval()(rows[name].to(recipe.device))
            yield name, logits, labels.to(recipe.device)

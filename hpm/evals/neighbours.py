"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.evals.features import Features
from hpm.evals.metrics import TrueClassRanks, mean_scores, rank

QUERIES = 512  # at once, at most
MOST_SIMILARITIES = 1 << 28  # at once: 1 GB, unless the views of one image need more


def nearest_neighbours(
    train: Features,
    test: Features,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> Iterator[tuple[int, TrueClassRanks]]:
    """Yield (k, rank of the true class of each test image), skipping k larger than the training
    set. The votes of several views of a test image are averaged."""
    device = device or torch.device("cpu")
    ks = [k for k in ks if k <= len(train.features)]
    bank = train.features.to(device, copy=True)
    F.normalize(bank, dim=1, out=bank)  # in place: raw pixels of ImageNet are 16 GB
    labels = train.labels.to(device)
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    at_once = min(QUERIES, MOST_SIMILARITIES // max(1, len(bank)))
    for ids in torch.arange(len(test.labels)).split(max(1, at_once // test.views)):
        queries = F.normalize(test.rows(ids).to(device), dim=1)
        votes = neighbour_votes(queries, bank, labels, num_classes, ks, temperature)
        for k in ks:
            scores = mean_scores(votes[k], test.views)
            parts[k].append(rank(scores, test.labels[ids].to(device)).ranks)
    for k in ks:
        ranks = torch.cat([*parts[k], torch.empty(0, dtype=torch.int64)])
        yield k, TrueClassRanks(ranks, test.labels)


def neighbour_votes(
    queries: Float[Tensor, "queries dim"],
    bank: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Float[Tensor, "queries classes"]]:
    """For each class, the sum of exp(cosine / temperature) over the k nearest training images.

    Queries and bank must have unit length.
    """
    nearest, ids = (queries @ bank.T).topk(max(ks, default=1), dim=1)
    weights = (
        (nearest - 1) / temperature
    ).exp()  # minus 1 avoids overflow, and scales all votes alike
    votes = {}
    for k in ks:
        empty = torch.zeros(len(queries), num_classes, device=queries.device)
        votes[k] = empty.scatter_add(1, labels[ids[:, :k]], weights[:, :k])
    return votes

"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.evals.features import Features


def knn(
    train: Features, test: Features, num_classes: int, ks: Sequence[int], temperature: float = 0.07
) -> Iterator[tuple[str, float]]:
    """Yield (`knn_K`, top-1 accuracy in percent) for every K that the training set is large
    enough for."""
    ks = [k for k in ks if k <= len(train.features)]
    right = dict.fromkeys(ks, 0)
    for features, labels in zip(test.features.split(512), test.labels.split(512), strict=True):
        votes = neighbour_votes(features, train, num_classes, ks, temperature)
        for k in ks:
            right[k] += int((votes[k].argmax(1) == labels).sum())
    for k in ks:
        yield f"knn_{k}", 100 * right[k] / len(test.labels)


def neighbour_votes(
    queries: Float[Tensor, "queries dim"],
    train: Features,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Float[Tensor, "queries classes"]]:
    """Sum of exp(cosine / temperature) over the k nearest training images, for each class."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(train.features, dim=1).T
    nearest, ids = similarity.topk(max(ks, default=1), dim=1)
    weights = ((nearest - 1) / temperature).exp()  # a common factor: no overflow
    labels: Int[Tensor, "queries k"] = train.labels[ids]
    votes = {}
    for k in ks:
        empty = torch.zeros(len(queries), num_classes)
        votes[k] = empty.scatter_add(1, labels[:, :k], weights[:, :k])
    return votes

"""From class scores to accuracies with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

RESAMPLES = 10_000


@dataclass
class TrueClassRanks:
    """Of each test image: how many classes were scored above the true one, and which that is."""

    ranks: Int[Tensor, " images"]
    labels: Int[Tensor, " images"]

    def numbers(self, seed: int) -> dict[str, float]:
        """See `accuracies`."""
        return accuracies(self, seed)

    def difference(self, other: TrueClassRanks, seed: int) -> dict[str, float]:
        """See `difference`."""
        return difference(self, other, seed)


def rank(scores: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> TrueClassRanks:
    """Where the true class stands; of equal scores the first class wins, as in argmax."""
    true = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    ranks = ((scores > true) | ((scores == true) & before)).sum(1)
    return TrueClassRanks(ranks.cpu(), labels.cpu())


def join(parts: Sequence[TrueClassRanks]) -> TrueClassRanks:
    """Several batches as one."""
    return TrueClassRanks(
        torch.cat([part.ranks for part in parts]), torch.cat([part.labels for part in parts])
    )


def accuracies(ranked: TrueClassRanks, seed: int = 0) -> dict[str, float]:
    """top1 with the ends of its 95 % bootstrap interval, top5, mean over classes; in percent."""
    right = (ranked.ranks == 0).double().numpy()
    low, high = bootstrap_interval(right, seed)
    labels = ranked.labels.numpy()
    per_class = [right[labels == label].mean() for label in np.unique(labels)]
    return {
        "top1": 100 * float(right.mean()),
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "top5": 100 * float((ranked.ranks < 5).double().mean()),
        "mean_per_class": 100 * float(np.mean(per_class)),
    }


def difference(first: TrueClassRanks, second: TrueClassRanks, seed: int = 0) -> dict[str, float]:
    """top-1 of the first less that of the second, in points, with its 95 % interval.

    Both on the same images, which are resampled in pairs: much narrower than from two intervals.
    Raises ValueError where the images differ.
    """
    if not torch.equal(first.labels, second.labels):
        raise ValueError("the two were not measured on the same images")
    gained = ((first.ranks == 0).long() - (second.ranks == 0).long()).double().numpy()
    low, high = bootstrap_interval(gained, seed)
    return {"top1": 100 * float(gained.mean()), "top1_low": 100 * low, "top1_high": 100 * high}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """2.5 and 97.5 percentile of the mean over resamples with replacement.

    The values are few distinct ones (right or wrong), so a resample is a multinomial draw of how
    often each occurs: the exact bootstrap, at a cost that does not grow with the images.
    """
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng([seed, len(values)])
    draws = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)
    low, high = np.percentile(draws @ distinct / len(values), [2.5, 97.5])
    return float(low), float(high)

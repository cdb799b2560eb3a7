"""Accuracies with confidence intervals, from class scores."""

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
    """For each test image, the rank of the true class (number of classes with a higher score) and
    its label."""

    ranks: Int[Tensor, " images"]
    labels: Int[Tensor, " images"]

    def numbers(self, seed: int) -> dict[str, float]:
        """See `accuracies`."""
        return accuracies(self, seed)

    def difference(self, other: TrueClassRanks, seed: int) -> dict[str, float]:
        """See `difference`."""
        return difference(self, other, seed)


def rank(scores: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> TrueClassRanks:
    """The rank of the true class. Among equal scores the first class wins, as in argmax. A score
    that is not a number is the last."""
    true = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    ranks = ((scores > true) | ((scores == true) & before)).sum(1)
    # Nothing is greater than NaN, which would win by that.
    ranks = torch.where(true[:, 0].isnan(), scores.shape[1] - 1, ranks)
    return TrueClassRanks(ranks.cpu(), labels.cpu())


def mean_scores(
    scores: Float[Tensor, "rows classes"], views: int
) -> Float[Tensor, "images classes"]:
    """The mean over the `views` consecutive rows of each image."""
    return scores if views == 1 else scores.unflatten(0, (-1, views)).mean(1)


def mean_probabilities(
    logits: Float[Tensor, "rows classes"], views: int
) -> Float[Tensor, "images classes"]:
    """The mean of the softmax over the views of each image; of a single view, the logits, which
    rank the classes alike."""
    return logits if views == 1 else mean_scores(logits.float().softmax(1), views)


def join(parts: Sequence[TrueClassRanks]) -> TrueClassRanks:
    """Concatenate batches."""
    return TrueClassRanks(
        torch.cat([part.ranks for part in parts]), torch.cat([part.labels for part in parts])
    )


def accuracies(ranked: TrueClassRanks, seed: int = 0) -> dict[str, float]:
    """top1 with its 95 % bootstrap interval, top5 and mean per-class accuracy, in percent."""
    right = (ranked.ranks == 0).double().numpy()
    low, high = bootstrap_interval(right, seed)
    labels = ranked.labels.numpy()
    images = np.bincount(labels)
    per_class = np.bincount(labels, right)[images > 0] / images[images > 0]
    return {
        "top1": 100 * float(right.mean()),
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "top5": 100 * float((ranked.ranks < 5).double().mean()),
        "mean_per_class": 100 * float(np.mean(per_class)),
    }


def difference(first: TrueClassRanks, second: TrueClassRanks, seed: int = 0) -> dict[str, float]:
    """Difference in top-1 accuracy (first minus second), in percentage points, with its 95 %
    interval.

    Both must be measured on the same images, which are resampled in pairs: the interval is much
    narrower than from two separate intervals.
    Raises ValueError where the images differ.
    """
    if not torch.equal(first.labels, second.labels):
        raise ValueError("the two were not measured on the same images")
    gained = ((first.ranks == 0).long() - (second.ranks == 0).long()).double().numpy()
    low, high = bootstrap_interval(gained, seed)
    return {"top1": 100 * float(gained.mean()), "top1_low": 100 * low, "top1_high": 100 * high}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval: 2.5th and 97.5th percentile of the mean over resamples.

    The values are few distinct ones (right or wrong), so a resample is a multinomial draw of how
    often each occurs: the exact bootstrap, at a cost that does not grow with the images.
    """
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng([seed, len(values)])
    draws = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)
    low, high = np.percentile(draws @ distinct / len(values), [2.5, 97.5])
    return float(low), float(high)

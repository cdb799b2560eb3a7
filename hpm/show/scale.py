"""One colour scale for the actual and predicted losses of patches.

A predictor gives the patches of an image an order, but its numbers have no unit. So that the two
maps compare, the predicted loss of a patch is drawn as the actual loss of the same rank: a perfect
order gives the same map.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

STOPS = 9  # of the bar's gradient

Losses = Float[np.ndarray, "*batch patches"]


class Scale(NamedTuple):
    """The losses of the darkest and the brightest colour."""

    low: float
    high: float

    @property
    def words(self) -> tuple[str, str]:
        """Both ends in two digits, or three where these hardly tell them apart."""
        digits = 2 if self.low < 0.7 * self.high else 3
        return f"{self.low:#.{digits}g}", f"{self.high:#.{digits}g}"


def scale_of(actual: np.ndarray) -> Scale | None:
    """The scale of losses: their 1st to 99th percentile. None if all are unknown."""
    known = actual[np.isfinite(actual)]
    if not len(known):
        return None
    low, high = np.quantile(known, (0.01, 0.99))
    return Scale(float(low), float(high))


def as_losses(predicted: Losses, actual: Losses) -> Losses:
    """The actual loss of the same rank in the image, for each predicted one. The order stays;
    images without actual losses become NaN."""
    rows = predicted.reshape(-1, predicted.shape[-1])
    known = actual.reshape(rows.shape)
    matched = [_matched(*pair) for pair in zip(rows, known, strict=True)]
    return np.stack(matched).reshape(predicted.shape)


def _matched(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    known = np.sort(actual[np.isfinite(actual)])
    if not len(known):
        return np.full(predicted.shape, np.nan, np.float32)
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    # Ties get their mean rank.
    ranks = (np.cumsum(counts) - (counts + 1) / 2) / max(len(predicted) - 1, 1)
    return np.quantile(known, ranks)[inverse].astype(np.float32)


def bar(scale: Scale) -> str:
    """The bar of a scale, as HTML; `strip.css` and `bar_style` style it."""
    low, high = scale.words
    return f'<span class="bar">{low}<i class="ramp"></i>{high}</span>'


@cache
def bar_style() -> str:
    """CSS of the bar's colours."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    stops = ",".join(to_hex(colormaps["magma"](place)) for place in np.linspace(0, 1, STOPS))
    return f".bar i {{ background: linear-gradient(to right,{stops}); }}\n"

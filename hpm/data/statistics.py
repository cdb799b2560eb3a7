"""Mean and standard deviation of the channels of a source."""

from __future__ import annotations

import numpy as np

from hpm.core.errors import UserError
from hpm.data.loader import EvaluationViews, Views
from hpm.data.sources import Source

MOST_TRIED = 20  # times as many images as are measured, if most of them cannot be read


def measure_statistics(
    source: Source,
    size: tuple[int, int],
    channels: int,
    seed: int,
    min_side: int = 1,
    count: int = 512,
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over `count` random images; full scale is 1.
    Of a video, the frame in the middle is used.

    Raises UserError if no image can be read.
    """
    views = Views(source, EvaluationViews(size, channels, min_side), stand_in=False)
    sums, squares, images, problem = np.zeros(channels), np.zeros(channels), 0, "it is empty"
    order = np.random.default_rng([seed, 1]).permutation(len(source))[: MOST_TRIED * count]
    for index in order:
        sample = views[0, int(index)]
        if sample.view is None:
            problem = sample.unreadable[0][1]
            continue
        pixels = sample.view.reshape(channels, -1).astype(np.float64) / 255
        sums += pixels.mean(1)
        squares += (pixels**2).mean(1)
        images += 1
        if images == count:
            break
    if images == 0:
        raise UserError(f"{source.name}: no readable image among {len(order)} ({problem})")
    mean, mean_square = sums / images, squares / images
    # Avoid division by zero for a constant channel, yet keep the small std of small values.
    scale = np.where(mean_square > 0, np.minimum(mean_square, 1), 1)
    std = np.sqrt(np.maximum(mean_square - mean**2, 1e-6 * scale))
    return mean.tolist(), std.tolist()

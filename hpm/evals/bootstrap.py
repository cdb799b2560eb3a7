"""Bootstrap over test images, for numbers that are no mean over images, such as IoU and AP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

AT_ONCE = 250  # resamples


def drawn_images(
    images: int, seed: int, resamples: int
) -> Iterator[Int[np.ndarray, "some images"]]:
    """How often each resample draws each image, some resamples at a time; the same for the same
    seed, so that two models are compared in pairs."""
    rng = np.random.default_rng([seed, images])
    for start in range(0, resamples, AT_ONCE):
        count = min(AT_ONCE, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size=count)


def centred(
    resampled: Float[np.ndarray, "measures resamples"],
    values: Float[np.ndarray, " measures"],
    lowest: float,
    highest: float,
) -> Float[np.ndarray, "measures resamples"]:
    """The resamples, with their mean moved to the values.

    A resample holds about 63 % of the images. Measures that are means over classes, of which some
    occur in few images, are biased by the missing ones.
    """
    known = ~np.isnan(resampled)
    mean = np.where(known, resampled, 0).sum(1) / known.sum(1).clip(1)
    return (resampled + (values - mean)[:, None]).clip(lowest, highest)


def in_percent(
    names: Sequence[str],
    values: Float[np.ndarray, " measures"],
    resampled: Float[np.ndarray, "measures resamples"],
) -> dict[str, float]:
    """Values by name, with the ends of their 95 % intervals (NAME_low, NAME_high), in percent.

    Resamples in which a measure is undefined (NaN) are left out of its interval.
    """
    ends = np.full((2, len(values)), np.nan)
    known = ~np.isnan(resampled).all(1)
    ends[:, known] = np.nanpercentile(resampled[known], [2.5, 97.5], axis=1)
    rows = {"": values, "_low": ends[0], "_high": ends[1]}
    return {
        f"{name}{end}": 100 * float(row[i])
        for i, name in enumerate(names)
        for end, row in rows.items()
    }

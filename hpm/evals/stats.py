"""Statistics of features without labels: effective rank, and similarity of patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpm.core.options import option
from hpm.evals.contract import Measured
from hpm.evals.options import FrozenEvalOptions

if TYPE_CHECKING:
    from hpm.evals.task import Task

COLUMNS = {
    "effective rank": "{rank:.1f}",
    "highest possible": "{of:.0f}",
    "similarity of patches": "{patch_similarity:.3f}",
}


@dataclass
class Options(FrozenEvalOptions):
    """Statistics of features without labels: effective rank, similarity of patches."""

    images: int = option(10_000, at_least=1)
    """Number of images to measure on, drawn at random."""


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield a row for each kind of features, and the predictor's numbers."""
    from hpm.evals.feature_stats import feature_stats
    from hpm.evals.hardness import predictor_numbers

    source = task.some_images(options.images)
    stats, task.about["measured_images"] = feature_stats(
        task.backbones, source, task.reader, options.baselines
    )
    for name, numbers in stats.items():
        yield Measured(name, numbers=numbers)
    yield from predictor_numbers(task)

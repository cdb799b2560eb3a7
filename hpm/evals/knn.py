"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpm.core.errors import UserError, counted
from hpm.core.options import option
from hpm.evals.contract import Measured
from hpm.evals.options import ClassificationOptions, FrozenEvalOptions

if TYPE_CHECKING:
    from hpm.evals.task import Task


@dataclass
class Options(FrozenEvalOptions, ClassificationOptions):
    """k-nearest-neighbour classification of frozen features."""

    k: tuple[int, ...] = option((10, 20, 100, 200), at_least=1, main=True)
    """Numbers of neighbours. Values larger than the training set are skipped."""
    temperature: float = option(0.07, above=0)
    """Temperature of the votes, exp(similarity / temperature)."""


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield a row for each kind of pooled features and each k, and the predictor's numbers."""
    from hpm.core import distributed
    from hpm.evals.hardness import predictor_numbers
    from hpm.evals.neighbours import nearest_neighbours

    data = task.labelled(options.train_share)
    train, test = task.pooled(data)
    task.count_images(train, test)
    count = task.about["train_images"]
    if count < min(options.k):
        raise UserError(
            f"k {min(options.k)} is more than {counted(count, 'training image')}: "
            "pass a smaller --k"
        )

    def classify() -> list[Measured]:
        how = len(data.classes), options.k, options.temperature, task.device
        return [
            Measured(name, f"k = {k}", ranks)
            for name in train
            for k, ranks in nearest_neighbours(train[name], test[name], *how)
        ]

    yield from distributed.main_first(classify)
    yield from predictor_numbers(task)

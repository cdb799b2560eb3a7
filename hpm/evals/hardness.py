"""Whether the loss predictor and the teacher know which patches are hard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpm.core.errors import UserError
from hpm.core.options import option
from hpm.evals.contract import PREDICTOR, Measured, Numbers
from hpm.evals.options import EvalOptions

if TYPE_CHECKING:
    from hpm.evals.task import Task


@dataclass
class Options(EvalOptions):
    """How well the loss predictor ranks patches by difficulty."""

    images: int = option(256, at_least=1)
    """Number of images to measure on, drawn at random."""


def run(task: Task, options: Options) -> Iterator[Measured]:
    """The predictor's numbers."""
    trained = task.trained
    if trained.model is None:
        raise UserError(
            f"{options.run} holds a backbone only: without decoders it has no losses to measure"
        )
    if not _has_predictor(task):
        raise UserError(f"{options.run} has no loss predictor, so there is nothing to measure")
    yield Measured(PREDICTOR, numbers=_numbers(task, options.images))


def of_the_predictor(task: Task, images: int = 256) -> Iterator[Measured]:
    """The same for another evaluation to end with; nothing where there is no predictor."""
    if not _has_predictor(task):
        return
    try:
        yield Measured(PREDICTOR, numbers=_numbers(task, images))
    except UserError as error:
        # A frozen model or a codebook may be missing here: no reason to lose all other numbers.
        task.reader.report(f"the predictor is not measured: {error}")


def _has_predictor(task: Task) -> bool:
    trained = task.trained
    return (
        trained.model is not None
        and trained.teacher is not None
        and trained.model.predictor is not None
    )


def _numbers(task: Task, images: int) -> Numbers:
    """Of the trained model's predictor and teacher."""
    from hpm.core import distributed
    from hpm.evals.loss_maps import evaluate_losses

    def evaluate_them() -> Numbers:
        trained, options = task.trained, task.options
        assert trained.model is not None and trained.teacher is not None
        trained.model.to(task.device).eval()
        trained.teacher.to(task.device).eval()
        source = task.some_images(images)
        return evaluate_losses(
            trained, source, task.device, options.seed, crop_share=options.crop_share
        )

    return distributed.main_first(evaluate_them)

"""Evaluate how well the loss predictor and the teacher rank patches by difficulty."""

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
    """Yield the numbers of the predictor and the teacher."""
    trained = task.trained
    if trained.model is None:
        raise UserError(
            f"{options.run} holds a backbone only: without decoders it has no losses to measure"
        )
    if not _has_predictor(task):
        raise UserError(f"{options.run} has no loss predictor, so there is nothing to measure")
    task.about["measured_images"] = len(task.some_images(options.images))
    yield Measured(PREDICTOR, numbers=_numbers(task, options.images))


def predictor_numbers(task: Task, images: int = 256) -> Iterator[Measured]:
    """The same, for use at the end of another evaluation; yields nothing without a predictor."""
    if not _has_predictor(task):
        return
    try:
        yield Measured(PREDICTOR, numbers=_numbers(task, images))
    except UserError as error:
        # A frozen model or a codebook may be missing; keep the other numbers.
        task.reader.report(f"the predictor is not measured: {error}")


def _has_predictor(task: Task) -> bool:
    trained = task.trained
    return (
        trained.model is not None
        and trained.teacher is not None
        and trained.model.predictor is not None
    )


def _numbers(task: Task, images: int) -> Numbers:
    """Measure the predictor and the teacher."""
    from hpm.core import distributed
    from hpm.evals.loss_maps import evaluate_losses

    def measure() -> Numbers:
        trained, options = task.trained, task.options
        assert trained.model is not None and trained.teacher is not None
        trained.model.to(task.device).eval()
        trained.teacher.to(task.device).eval()
        source = task.some_images(images)
        return evaluate_losses(
            trained,
            source,
            task.device,
            options.seed,
            crop_share=options.crop_share,
            frame_stride=options.frame_stride,
        )

    return distributed.main_first(measure)

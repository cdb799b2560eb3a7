"""Run an evaluation, and write its result as JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hpm.core import distributed
from hpm.core.errors import UserError, why
from hpm.core.options import check_rules
from hpm.core.random_state import random_state_kept
from hpm.core.version import __version__
from hpm.evals.contract import COMPARED, OVER_FRAMES, PREDICTOR, TRAINED, Evaluation, Measured
from hpm.evals.files import result_file
from hpm.evals.options import EvalOptions
from hpm.evals.result import Result
from hpm.evals.task import Task


def run_evaluation(
    evaluation: Evaluation, options: EvalOptions, report: Callable[[str], None] = print
) -> Result:
    """Evaluate, and write the result if there is a folder for it."""
    check_rules(options)
    device = distributed.pick_device(options.device)
    with distributed.process_group(device), random_state_kept(device):
        start = time.perf_counter()
        task = Task(options, device, report)
        rows = list(evaluation.run(task, options))
        given = dataclasses.asdict(options)
        resolved = [name for name, value in given.items() if task.about.get(name, value) != value]
        about = given | task.about
        about |= {
            "resolved": resolved,  # options that were not given, with the values that were used
            "step": task.trained.step,
            "weights": "teacher" if options.teacher else "student",
            "architecture": task.trained.architecture.to_json(),
            "device": str(device),
            "hpm": __version__,
            "seconds": round(time.perf_counter() - start, 1),
        }
        result = make_result(evaluation, about, rows)
        folder = task.folder
        if folder:
            result.unwritable = distributed.main_first(lambda: _save(result, options, rows, folder))
    return result


def make_result(
    evaluation: Evaluation, about: dict[str, Any], measured: Iterable[Measured]
) -> Result:
    """Group rows by features and setting, and compute the differences between two runs."""
    rows = {(each.features, each.setting or evaluation.name): each for each in measured}
    # An encoder of clips may be compared with one of images, whose features are pooled over frames.
    others = {
        (features.removesuffix(OVER_FRAMES), setting): row
        for (features, setting), row in rows.items()
        if features.startswith(COMPARED)
    }
    seed = about["seed"]
    result = Result(evaluation.name, about, columns=evaluation.columns)
    for (features, setting), row in rows.items():
        numbers = (row.scores.numbers(seed) if row.scores else {}) | dict(row.numbers)
        if features == PREDICTOR:
            result.hardness = numbers
            continue
        result.values.setdefault(features, {})[setting] = numbers
        if row.per_class:
            result.per_class.setdefault(features, {})[setting] = dict(row.per_class)
        if row.chosen:
            result.chosen[features] = dict(row.chosen)
        kind = features.removesuffix(OVER_FRAMES).replace(TRAINED, COMPARED, 1)
        other = others.get((kind, setting))
        if other and other is not row and row.scores and other.scores:
            difference = row.scores.difference(other.scores, seed)
            result.differences.setdefault(features, {})[setting] = difference
    return result


def _save(
    result: Result, options: EvalOptions, rows: Iterable[Measured], folder: Path
) -> str | None:
    """Write the numbers and the figures. Returns the reason if that fails, so that the numbers are
    still printed."""
    try:
        file = result_file(result.protocol, options, folder)
        figures = {
            file.with_name(f"{file.stem}_{ending}"): write
            for row in rows
            for ending, write in row.figures.items()
        }
        result.figures = [figure.name for figure in figures]
        result.save(file)
        for figure, write in figures.items():
            write(figure)
    except UserError as error:
        return f"{error}; --out names another folder"
    except OSError as error:
        return f"{folder}: {why(error)}; --out names another folder"
    return None

"""Evaluations: a backbone and images in, named numbers out (see `hpm.evals.contract`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpm.core.options import AnyPath, make_config, read_preset
from hpm.evals.contract import find

if TYPE_CHECKING:
    from hpm.evals.result import Result


def evaluate(
    protocol: str,
    run: AnyPath,
    data: Any,
    report: Callable[[str], None] = print,
    config: str | Path | None = None,
    **options: Any,
) -> Result:
    """Evaluate a backbone: `hpm.evaluate("knn", "runs/first", "flowers/")`.

    Args:
        protocol: knn, linear, attentive, finetune, segment, detect, stats or hardness; or the
            dotted name of a module of your own (see `hpm.evals.contract`).
        run: run folder, checkpoint or backbone file.
        data: what `hpm.pretrain` takes, with labels for the first four; images with masks for
            segment, with objects for detect.
        report: called with each message, such as an unreadable image.
        config: name of a preset, or a YAML file; `options` take precedence.
        options: fields of the protocol's `Options`.

    The result is also written as JSON into the run folder. If that fails, `report` is called with
    the reason, and the result contains it. Raises UserError on bad input.
    """
    from hpm.data.given import named
    from hpm.evals.running import run_evaluation

    evaluation = find(protocol)
    preset = read_preset(config) if config else {}
    given = preset | {"run": run, "data": named(data)} | options
    given |= {"test": named(given["test"])} if "test" in given else {}
    result = run_evaluation(evaluation, make_config(evaluation.options, given), report)
    if result.unwritable:
        report(result.unwritable)
    return result

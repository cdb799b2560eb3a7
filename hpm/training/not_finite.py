"""Handle a loss that is not finite: save the batch, and write an error with advice."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.files import StateDict, write_tensors
from hpm.training.sessions import read_lines
from hpm.weights.checkpoint import list_checkpoints, step_of
from hpm.weights.run_folder import RunFolder

LOSSES = ("reconstruction_loss", "predictor_loss")
WINDOW = 20  # logged losses before a checkpoint, whose median its loss is compared with
MAX_RATIO = 2.0  # of a good checkpoint's loss to that median


def not_finite_error(
    files: RunFolder, step: int, tensors: StateDict, config: PretrainConfig
) -> UserError:
    """Save the step's tensors for a replay. Returns an error that names the file, the last good
    checkpoint, and what to change."""
    file = files.folder / f"not_finite_step_{step:08d}_rank_{distributed.rank()}.safetensors"
    write_tensors(file, tensors, {"batch_of_step": step})
    checkpoints = list_checkpoints(files.checkpoints)
    judged = judge_checkpoints(checkpoints, list(read_lines(files.folder / "metrics.jsonl")))
    return UserError(
        f"the loss is not finite at step {step}; {judged}; its batch: {file}; {advice(config)}"
    )


def judge_checkpoints(checkpoints: Sequence[Path], metrics: Sequence[dict[str, Any]]) -> str:
    """Find the latest checkpoint whose losses had not risen yet; returns a text.

    Losses often rise for some steps before they become non-finite; checkpoints of that time are
    finite but useless. checkpoints: oldest first. metrics: the lines of metrics.jsonl.
    """
    if not checkpoints:
        return "there is no checkpoint yet"
    problem = ""
    for checkpoint in reversed(checkpoints):
        found = _risen(step_of(checkpoint), metrics)
        if found is None:
            later = f" (later ones are not: {problem})" if problem else ""
            return f"last good checkpoint: {checkpoint}{later}"
        problem = problem or found
    return f"no checkpoint is good ({problem})"


def advice(config: PretrainConfig) -> str:
    """What to change in the configuration."""
    changes = []
    if config.base_lr:
        changes.append(f"lower --base-lr (it is {config.base_lr:g})")
    if config.precision != "float32":
        changes.append("train in --precision float32")
    if not changes:
        return "look at the images of the batch"
    return f"{' or '.join(changes)}, in another --out"


def _risen(step: int, metrics: Sequence[dict[str, Any]]) -> str | None:
    """Describe the loss that had risen at the step of a checkpoint; None if none had."""
    for name in LOSSES:
        values = [line[name] for line in metrics if name in line and line["step"] <= step]
        if len(values) < 2:
            continue
        median = statistics.median(values[-1 - WINDOW : -1])
        if not values[-1] <= MAX_RATIO * median:
            return f"at step {step} {name} was {values[-1]:.3g}, before that {median:.3g}"
    return None

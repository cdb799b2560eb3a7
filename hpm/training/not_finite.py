"""A training whose loss is not finite: what is kept of it, and what the user reads."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.files import StateDict, write_tensors
from hpm.training.sessions import read_lines
from hpm.weights.checkpoint import list_checkpoints
from hpm.weights.run_folder import RunFolder

LOSSES = ("reconstruction_loss", "predictor_loss")
READINGS = 20  # before a checkpoint that its losses are compared with
NEAR = 2.0  # times the median of those


def not_finite_error(
    files: RunFolder, step: int, tensors: StateDict, config: PretrainConfig
) -> UserError:
    """Save the tensors of the step for a replay. The error says where they are, which checkpoint is
    still good, and what to change."""
    file = files.folder / f"not_finite_step_{step:08d}_rank_{distributed.rank()}.safetensors"
    write_tensors(file, tensors, {"batch_of_step": step})
    checkpoints = list_checkpoints(files.checkpoints)
    judged = judge_checkpoints(checkpoints, read_lines(files.folder / "metrics.jsonl"))
    return UserError(
        f"the loss is not finite at step {step}; {judged}; its batch: {file}; {advice(config)}"
    )


def judge_checkpoints(checkpoints: Sequence[Path], metrics: Sequence[dict[str, Any]]) -> str:
    """Which checkpoint to go back to: the latest whose losses were near the ones read before it.

    Losses often grow for some steps before they are not finite, and a checkpoint of that time is
    finite, but no good. checkpoints: oldest first; metrics: the lines of metrics.jsonl.
    """
    if not checkpoints:
        return "there is no checkpoint yet"
    problem = ""
    for checkpoint in reversed(checkpoints):
        found = _risen(_step(checkpoint), metrics)
        if found is None:
            later = f" (later ones are not: {problem})" if problem else ""
            return f"last good checkpoint: {checkpoint}{later}"
        problem = problem or found
    return f"no checkpoint is good ({problem})"


def advice(config: PretrainConfig) -> str:
    """What to change, of what is not so already."""
    changes = []
    if config.base_lr:
        changes.append(f"lower --base-lr (it is {config.base_lr:g})")
    if config.precision != "float32":
        changes.append("train in --precision float32")
    if not changes:
        return "look at the images of the batch"
    return f"{' or '.join(changes)}, in another --out"


def _risen(step: int, metrics: Sequence[dict[str, Any]]) -> str | None:
    """Which loss had risen when a checkpoint was written, in words; None for none."""
    for name in LOSSES:
        read = [line[name] for line in metrics if name in line and line["step"] <= step]
        if len(read) < 2:
            continue
        usual = statistics.median(read[-1 - READINGS : -1])
        if not read[-1] <= NEAR * usual:
            return f"at step {step} {name} was {read[-1]:.3g}, before that {usual:.3g}"
    return None


def _step(checkpoint: Path) -> int:
    found = re.search(r"(\d+)", checkpoint.stem)
    assert found is not None, checkpoint
    return int(found[1])

"""Evaluations: a backbone and images in, named numbers out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpm.core import distributed
from hpm.core.errors import UserError, nearest, why
from hpm.core.options import check_rules, make_config, read_preset
from hpm.core.random_state import random_state_kept
from hpm.core.version import __version__
from hpm.evals.features import Reading
from hpm.evals.files import COMPARED, result_file, training_folder
from hpm.evals.metrics import accuracies, difference
from hpm.evals.options import PROTOCOLS, EvalConfig
from hpm.evals.protocols import TRAINED, Outcome, Task, run_protocol
from hpm.evals.result import Result, print_result

__all__ = ["PROTOCOLS", "Result", "evaluate", "print_result"]


def evaluate(
    protocol: str,
    run: str | Path,
    data: str | Path,
    report: Callable[[str], None] = print,
    config: str | Path | None = None,
    **options: Any,
) -> Result:
    """Evaluate a backbone: `hpm.evaluate("knn", "runs/first", "flowers/")`.

    Args:
        protocol: knn, linear, attentive, finetune, stats or hardness.
        run: run folder, checkpoint or backbone file.
        data: images, labelled for the first four.
        report: is called with each line on what was passed over.
        config: name of a preset, or a YAML file, that the options are laid over.
        options: those of the protocol's class in `config.py`.

    The result is also written as JSON into the run folder; where that is not possible, `report` is
    told, and the result says why. Raises UserError on bad input.
    """
    if protocol not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise UserError(f"no evaluation '{protocol}'{nearest(protocol, PROTOCOLS)} ({known})")
    preset = read_preset(config) if config else {}
    given = preset | {"run": run, "data": data} | options
    result = run_evaluation(make_config(PROTOCOLS[protocol], given), report)
    if result.unwritable:
        report(result.unwritable)
    return result


def run_evaluation(config: EvalConfig, report: Callable[[str], None] = print) -> Result:
    """Evaluate as configured; the class of the config says by which protocol."""
    check_rules(config)
    protocol = next(name for name, cls in PROTOCOLS.items() if type(config) is cls)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device), random_state_kept(device):
        start = time.perf_counter()
        most = getattr(config, "max_unreadable", 1.0)
        reading = Reading(config.batch_size, config.workers, report, config.crop_share, most)
        task = Task(config, device, reading)
        run_folder = task.trained.folder
        folder = Path(config.out) if config.out else run_folder and run_folder / "evals"
        outcome = run_protocol(task, training_folder(config, folder) if folder else None)
        about = dataclasses.asdict(config) | outcome.images
        about |= {
            "step": task.trained.step,
            "weights": "teacher" if config.teacher else "student",
            "architecture": task.trained.architecture.to_json(),
            "device": str(device),
            **({"classes": task.classes} if task.classes else {}),
            "hpm": __version__,
            "seconds": round(time.perf_counter() - start, 1),
        }
        result = _result(protocol, about, outcome, config.seed)
        if folder:
            result.unwritable = distributed.main_first(
                lambda: _save(result, config, protocol, folder)
            )
    return result


def _save(result: Result, config: EvalConfig, protocol: str, folder: Path) -> str | None:
    """Write the numbers. Where that fails they are not lost: says why instead."""
    try:
        result.save(result_file(config, protocol, folder))
    except UserError as error:
        return f"{error}; --out names another folder"
    except OSError as error:
        return f"{folder}: {why(error)}; --out names another folder"
    return None


def _result(protocol: str, about: dict[str, Any], outcome: Outcome, seed: int) -> Result:
    values = outcome.values or {
        name: {setting: accuracies(ranked, seed) for setting, ranked in settings.items()}
        for name, settings in outcome.ranked.items()
    }
    differences = {
        name: {
            setting: difference(ranked, outcome.ranked[other][setting], seed)
            for setting, ranked in settings.items()
        }
        for name, settings in outcome.ranked.items()
        if (other := name.replace(TRAINED, COMPARED, 1)) in outcome.ranked and other != name
    }
    return Result(protocol, about, values, differences, outcome.chosen, outcome.hardness)

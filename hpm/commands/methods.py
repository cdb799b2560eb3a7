"""`hpm methods`: does mining help on these images? Four methods at equal time, over several seeds.

An ablation of `hpm.commands.ablate` whose arms differ in their number of steps, so that all train
for the same time. What a step of each takes is measured once, before the first run."""

from __future__ import annotations

import dataclasses
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hpm.commands.ablate import train_and_measure
from hpm.commands.ablation_plan import ARMS, PlannedRun, Variant, plan_runs
from hpm.commands.methods_results import MethodsResults
from hpm.commands.options import MethodsConfig
from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.durations import time_text
from hpm.core.errors import UserError, counted
from hpm.core.files import write_text
from hpm.core.options import describe
from hpm.core.progress import say
from hpm.core.signals import Stop, stop_signals
from hpm.pretraining import training_parts
from hpm.training.length import RESERVE
from hpm.training.pace import Pace, steps_within
from hpm.training.trial import Timed, Trial, measure_pace, trial_of

ROUNDS = 3  # in which the methods are timed in turns
ROUND_SECONDS = 60.0  # at most, of a method
REFERENCE = "hpm"  # the method whose length --epochs and --steps give
SET_BY_ALL = [name for name in ARMS[REFERENCE] if all(name in arm for arm in ARMS.values())]
FREE = {"seeds", "labels"}  # options that a comparison may go on with other values of


def methods(config: MethodsConfig) -> MethodsResults:
    """Train each method with each seed, for as long as the others; write `methods.md`, `.csv` and
    `.png`, and the runs beside each other in `compare.html`.

    Finished runs and evaluations are not repeated. Raises UserError before training if something
    cannot work.
    """
    for name in SET_BY_ALL:  # a --config of one of them has them, too
        if (value := getattr(config, name)) != getattr(PretrainConfig, name):
            say(f"{name} {value} is not used: each method has its own")
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):  # which all runs share
        plain = plan_runs(config, [_variant(name) for name in ARMS])
        with stop_signals() as stop:
            steps = _steps_of_each(config, {str(run.variant): run for run in plain[::-1]}, stop)
        variants = [_variant(name, steps[name]) for name in ARMS]
        results = MethodsResults(Path(config.out), variants)
        train_and_measure(config, plan_runs(config, variants), results)
    return results


def _variant(name: str, steps: int | None = None) -> Variant:
    return Variant({"arm": name}, ARMS[name] | ({} if steps is None else {"steps": steps}))


def _steps_of_each(
    config: MethodsConfig, runs: dict[str, PlannedRun], stop: Stop
) -> dict[str, int]:
    """The number of steps of each method. It is measured once, and kept in `times.json`.

    runs: one of each method, of the first seed.
    """
    file, options = Path(config.out) / "times.json", _options(config)
    if found := distributed.main_first(lambda: _kept(file, options)):
        return found
    say(f"timing {counted(len(runs), 'method')}")
    times = time_methods({name: run.config for name, run in runs.items()}, stop)
    steps = distributed.from_main(equal_time(times, config))
    paces = {name: dataclasses.asdict(timed.pace) for name, timed in times.items()}
    content = {"steps": steps, "seconds": paces, "options": options}
    distributed.main_first(lambda: write_text(file, json.dumps(content, indent=2) + "\n"))
    run_seconds = max(timed.seconds(steps[name]) for name, timed in times.items())
    for name, timed in times.items():
        say(f"  {name}: {counted(steps[name], 'step')} of {timed.pace.step:.3g} s")
    whole = time_text(run_seconds * len(steps) * config.seeds)
    say(f"  about {time_text(run_seconds)} for each of {len(steps) * config.seeds} runs: {whole}")
    return steps


def equal_time(times: dict[str, Timed], config: PretrainConfig) -> dict[str, int]:
    """The number of steps of each method, so that all take the same time: --max-hours, or what the
    steps of the reference take for --epochs or --steps. Raises UserError if a method has no time
    for a step."""
    paces = {name: timed.pace for name, timed in times.items()}
    if config.max_hours is not None:
        limit = (1 - RESERVE) * 3600 * config.max_hours
    else:
        paces = {name: pace.training() for name, pace in paces.items()}
        reference = times[REFERENCE]
        limit = paces[REFERENCE].seconds(reference.schedule_of(reference.length))
    steps = {name: steps_within(limit, paces[name], times[name].schedule_of) for name in times}
    for name, count in steps.items():
        if count == 0:
            raise UserError(
                f"{time_text(limit)} are too short for {name}, of which "
                f"{times[name].pace.described()}: pass more time, or a smaller model or batch"
            )
    return steps


def time_methods(configs: dict[str, PretrainConfig], stop: Stop) -> dict[str, Timed]:
    """Time the parts of a training with each method.

    The steps are timed in turns, so that a change of the machine's speed meets all methods; on a
    GPU, whose memory may hold one training only, one method after the other. What does not depend
    on the method, such as an evaluation, is the median of all.
    """
    device = distributed.pick_device(next(iter(configs.values())).device)
    at_once = [configs] if device.type == "cpu" else [{n: c} for n, c in configs.items()]
    found: dict[str, tuple[Timed, list[float]]] = {}
    for some in at_once:
        found |= _in_turns(some, device, stop)
    paces = [timed.pace for timed, _ in found.values()]
    return {
        name: timed._replace(pace=_pace(paces, seconds)) for name, (timed, seconds) in found.items()
    }


def _in_turns(
    configs: dict[str, PretrainConfig], device: torch.device, stop: Stop
) -> dict[str, tuple[Timed, list[float]]]:
    """(times of its parts, times of its steps in each round) of each method."""
    with ExitStack() as stack:
        trials = {
            name: stack.enter_context(trial_of(config, device, training_parts(None), stop))
            for name, config in configs.items()
        }
        paces = {name: measure_pace(trial, 20 * ROUND_SECONDS) for name, trial in trials.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trials}
        for _ in range(ROUNDS):
            for name, trial in trials.items():
                seconds[name].append(_round(trial))
        return {
            name: (Timed.of(trial, paces[name], configs[name]), seconds[name])
            for name, trial in trials.items()
        }


def _round(trial: Trial) -> float:
    count = trial.count_within(ROUND_SECONDS)
    return trial.step_seconds(count, again=trial.run.cache is not None)


def _pace(paces: list[Pace], step_seconds: list[float]) -> Pace:
    """The median of some paces, with the steps of one method."""
    medians = {
        field.name: statistics.median(getattr(pace, field.name) for pace in paces)
        for field in dataclasses.fields(Pace)
    }
    return Pace(**medians | {"step": statistics.median(step_seconds)})


def _options(config: MethodsConfig) -> dict[str, Any]:
    """The options that the steps of each method follow from, and that all runs share."""
    described = describe(MethodsConfig)
    values = {
        name: getattr(config, name)
        for name, each in described.items()
        if not each.rules.may_change and name not in FREE
    }
    return json.loads(json.dumps(values))


def _kept(file: Path, options: dict[str, Any]) -> dict[str, int] | None:
    """The steps of a comparison that has begun. Raises UserError if it has other options."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        before, steps = content["options"], content["steps"]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file} is damaged: remove it, or choose another --out") from None
    for name, value in options.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{file.parent} holds another comparison: there {name} is {before[name]}, here "
                f"{value}; choose another --out"
            )
    return steps

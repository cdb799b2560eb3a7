"""Plan an ablation: arms (named sets of options) and a grid of varied options."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from hpm.commands.options import AblateConfig, SeedOptions
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, nearest, one_line
from hpm.core.options import describe, lay_over, make_config
from hpm.targets.registry import options_of_others
from hpm.training.checks import check_pretrain

PretrainOptions = dict[str, Any]

# Without a teacher pass, its options take their neutral values ...
NO_TEACHER: PretrainOptions = {"teacher_scale": 1.0, "mine_every": 1, "teacher_view": "full"}
# ... and without mining, so do those of mining.
NO_MINING = NO_TEACHER | {"mine_by": "teacher", "mining_temperature": 0.0}
ARMS: dict[str, PretrainOptions] = {
    "mae": {"mask": "random", "predictor_loss": "none"} | NO_MINING,
    "predictor": {"mask": "random", "predictor_loss": "relative"} | NO_MINING,
    "hpm": {"mask": "easy_to_hard", "predictor_loss": "relative", "mine_by": "teacher"},
    "hpm_memory": {"mask": "easy_to_hard", "predictor_loss": "none", "mine_by": "memory"}
    | NO_TEACHER,
}
OPTIONS = {field.name for field in dataclasses.fields(PretrainConfig)}
OWN_ARM = "'NAME: mask=random predictor_loss=none'"


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    columns: its arm and the value of each varied option, which identify it. options: all options
    that it sets.
    """

    columns: dict[str, Any]
    options: PretrainOptions

    def __str__(self) -> str:
        parts = [str(v) if name == "arm" else f"{name}={v}" for name, v in self.columns.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class PlannedRun:
    """One training of the comparison."""

    variant: Variant
    config: PretrainConfig


def make_plan(config: AblateConfig) -> tuple[list[Variant], list[PlannedRun]]:
    """All variants, and one run per variant and seed, ordered by seed.

    Raises UserError listing all combinations that cannot work.
    """
    variants = make_variants(config.arm, config.vary)
    hint = f"; options that belong together are an arm, --arm {OWN_ARM}"
    return variants, plan_runs(config, variants, hint if len(config.vary) > 1 else "")


def plan_runs(config: SeedOptions, variants: list[Variant], hint: str = "") -> list[PlannedRun]:
    """One run per variant and seed, ordered by seed.

    hint: added to the UserError that lists all variants that cannot work.
    """
    if config.seeds < 1:
        raise UserError(f"seeds is {config.seeds}; it must be at least 1")
    runs: list[PlannedRun] = []
    problems: list[str] = []
    for seed in range(config.seed, config.seed + config.seeds):
        for variant in variants:
            try:
                runs.append(PlannedRun(variant, _run_config(config, variant, seed)))
            except UserError as error:
                problems.append(f"{variant}: {error}")
        if problems:
            break
    if len(problems) > 1:
        count = f"{len(problems)} of {len(variants)} combinations cannot be run"
        problems = [f"{count}: {'; '.join(problems)}"]
    if problems:
        raise UserError(problems[0] + hint)
    return runs


def make_variants(arm: tuple[str, ...], vary: tuple[str, ...]) -> list[Variant]:
    """Combine every arm with every combination of the varied options.

    `("mae", "hpm")` and `("mask_ratio=0.5,0.75",)` give four variants. Raises UserError on bad
    input.
    """
    if not arm and not vary:
        raise UserError(
            "name what to compare: --arm mae --arm hpm, or --vary mask=random,easy_to_hard"
        )
    arms = read_arms(arm)
    variants = []
    for varied in combinations(vary):
        for name, options in arms.items():
            for option in varied.keys() & options.keys():
                raise UserError(f"vary: {option} is set by arm {name}; make each value an arm")
            variants.append(Variant({"arm": name} | varied, options | varied))
    return variants or [Variant(varied, varied) for varied in combinations(vary)]


def read_arms(texts: tuple[str, ...]) -> dict[str, PretrainOptions]:
    """Name and options of each arm: one of ARMS, or `name: option=value option=value`."""
    arms: dict[str, PretrainOptions] = {}
    for text in texts:
        name, own, options = (part.strip() for part in text.partition(":"))
        if not own and name not in ARMS:
            raise UserError(
                f"no arm '{name}'{nearest(name, ARMS)} ({', '.join(ARMS)}, or your own: {OWN_ARM})"
            )
        if own and (name in ARMS or not re.fullmatch(r"[\w.+-]+", name)):
            reason = "is built in" if name in ARMS else "is not one word"
            raise UserError(f"arm '{text}': the name '{name}' {reason}; choose another")
        if name in arms:
            raise UserError(f"arm {name} is given twice")
        arms[name] = _own_options(text, options) if own else ARMS[name]
    return arms


def combinations(vary: tuple[str, ...]) -> list[PretrainOptions]:
    """All combinations of the varied options: `("mask=random,hardest", "mask_ratio=0.5,0.75")`
    gives four sets of options, `()` one empty set. Raises UserError on bad input."""
    options: dict[str, list[Any]] = {}
    for text in vary:
        name, values = _read_option("vary", text, "an option and its values, mask=random,hardest")
        if name in options:
            raise UserError(f"vary: {name} is named twice; put all of its values in one")
        found = _read_yaml(f"vary '{text}'", f"[{values}]")
        for value in found:
            if found.count(value) > 1:
                raise UserError(f"vary '{text}': {value} is there twice")
        options[name] = found
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def _own_options(text: str, options: str) -> PretrainOptions:
    where = f"arm '{text}'"
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not words:
        raise UserError(f"{where}: write its options, {OWN_ARM}")
    pairs = [_read_option("arm", word, f"options and their values, {OWN_ARM}") for word in words]
    found = {name: _read_yaml(where, value) for name, value in pairs}
    if len(found) < len(pairs):
        raise UserError(f"{where}: an option is there twice")
    return found


def _read_option(where: str, text: str, wanted: str) -> tuple[str, str]:
    """`mask-ratio=0.5` -> ("mask_ratio", "0.5"). Raises UserError for an unknown option."""
    spelled, given, value = text.partition("=")
    spelled = spelled.strip()
    if not given or not value.strip():
        raise UserError(f"{where} '{text}': write {wanted}")
    name = spelled.removeprefix("--").replace("-", "_")
    if name not in OPTIONS:
        # Suggest a name with dashes if the user typed dashes.
        dashed = spelled.count("-") > 0
        known = [option.replace("_", "-") if dashed else option for option in OPTIONS]
        raise UserError(f"{where}: unknown option '{spelled}'{nearest(spelled, known)}")
    if name in ("seed", "out", "data"):
        raise UserError(f"{where}: {name} cannot be varied; --seeds says over how many seeds")
    return name, value


def _read_yaml(where: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: '{text}' cannot be read ({one_line(error)})") from error


def _run_config(config: SeedOptions, variant: Variant, seed: int) -> PretrainConfig:
    """The checked configuration of one variant and seed."""
    options = lay_over({name: getattr(config, name) for name in OPTIONS}, variant.options)
    for name in options_of_others(options["target"]):
        if name not in variant.options:
            options[name] = describe(PretrainConfig)[name].default
    out = Path(config.out) / str(variant).replace(", ", "_").replace("/", "-")
    run = make_config(PretrainConfig, options | {"seed": seed, "out": str(out / f"seed_{seed}")})
    check_pretrain(run)
    return run

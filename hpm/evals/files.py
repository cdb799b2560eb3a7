"""Names of result files, after the evaluation, its data and its options."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpm.core.options import describe
from hpm.evals.contract import COMPARED
from hpm.evals.options import EvalOptions

# Options with a place of their own in file names and tables.
NAMED_SEPARATELY = ("run", "data", "test", "compare", "teacher", "train_share")
MAX_OPTIONS_LENGTH = 80  # characters of a file name


def changed_options(options: type[EvalOptions], about: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an evaluation (from its JSON's `about`) that were given other values than their
    defaults."""
    return {
        name: about[name]
        for name, each in describe(options).items()
        if each.rules.changes_numbers
        and name not in NAMED_SEPARATELY
        and name in about
        and name not in about.get("resolved", ())
        and _as_json(about[name]) != _as_json(each.default)
    }


def result_file(protocol: str, options: EvalOptions, folder: Path) -> Path:
    """The JSON file of this evaluation: an existing one of the same evaluation, or a new one.

    The name consists of protocol, data and non-default options (a digest if there are many), and a
    number if another evaluation already has that name.
    """
    about = dataclasses.asdict(options)
    stem = _stem(protocol, type(options), about)
    file, number = folder / f"{stem}.json", 1
    while file.exists() and not _holds(file, type(options), about):
        number += 1
        file = folder / f"{stem}_{number}.json"
    return file


def training_folder(protocol: str, options: EvalOptions, folder: Path, backbone: str) -> Path:
    """The folder of the model that an evaluation trains from a backbone. It does not depend on
    options that only affect testing, so that with other such options, and beside another run, the
    model is tested again without retraining."""
    kind = type(options)
    defaults = {n: each.default for n, each in describe(kind).items() if each.rules.testing_only}
    about = dataclasses.asdict(options) | defaults | {"compare": None}
    return folder / _stem(protocol, kind, about) / model_name(backbone, options.compare)


def model_name(backbone: str, compare: str | None) -> str:
    """The name of a backbone's folder; the compared one is named after its run."""
    name = backbone.replace(" ", "_")
    return f"{name}_{_name(compare)}" if backbone == COMPARED and compare else name


def _stem(protocol: str, options: type[EvalOptions], about: Mapping[str, Any]) -> str:
    parts = [_name(protocol), _name(about["data"])]
    parts += ["teacher"] if about["teacher"] else []
    parts += ["on", _name(about["test"])] if about["test"] else []
    share = about.get("train_share", 1.0)
    parts += [f"share_{share:g}"] if share < 1 else []
    parts += ["less", _name(about["compare"])] if about["compare"] else []
    changed = changed_options(options, about)
    text = "_".join(f"{name}_{_text(value)}" for name, value in changed.items())
    if len(text) > MAX_OPTIONS_LENGTH:
        text = f"options_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return "_".join([*parts, *([text] if text else [])])


def _holds(file: Path, options: type[EvalOptions], about: Mapping[str, Any]) -> bool:
    """Whether a file has the results of the same evaluation, or is damaged."""
    try:
        before = json.loads(file.read_text())["about"]
        same = all(before[name] == about[name] for name in ("data", "test", "compare"))
        # In a run's own folder, the path by which the run was given does not matter.
        same = same and (about["out"] is None or before["run"] == about["run"])
        changed = [_as_json(changed_options(options, each)) for each in (before, about)]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return same and changed[0] == changed[1]


def _as_json(value: Any) -> Any:
    """Convert to the types that are read back from JSON."""
    return json.loads(json.dumps(value))


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "_".join(map(_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else _name(str(value))


def _name(path: str) -> str:
    return re.sub(r"\W+", "_", path.strip("/.")) or "data"

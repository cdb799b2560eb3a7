"""Where the numbers of an evaluation go: named after what was evaluated, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpm.evals.options import EvalOptions

# Options that say what is evaluated: they have their own place in file names and tables.
NAMED_APART = ("run", "data", "test", "compare", "teacher", "train_share")
MAX_OPTIONS_LENGTH = 80  # characters of a file name


def changed_options(options: type[EvalOptions], about: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an evaluation (as in its JSON's `about`) that are not the defaults."""
    return {
        field.name: about[field.name]
        for field in dataclasses.fields(options)
        if field.name not in (*NAMED_APART, *options.no_effect)
        and field.name in about
        and _plain(about[field.name]) != _plain(field.default)
    }


def result_file(protocol: str, options: EvalOptions, folder: Path) -> Path:
    """The JSON file for these numbers: that of the same evaluation, or one that is not there yet.

    Its name tells protocol, data and the options that are not the defaults (a digest of them where
    they are many); a number follows where another evaluation has that name.
    """
    about = dataclasses.asdict(options)
    stem = _stem(protocol, type(options), about)
    file, number = folder / f"{stem}.json", 1
    while file.exists() and not _holds(file, type(options), about):
        number += 1
        file = folder / f"{stem}_{number}.json"
    return file


def training_folder(protocol: str, options: EvalOptions, folder: Path) -> Path:
    """Where an evaluation that trains keeps itself. Its name tells nothing of how it is tested, or
    beside what: with other such options the trained model is tested anew, not trained anew."""
    defaults = type(options)
    same = {"crop_share": defaults.crop_share, "baselines": defaults.baselines}
    return folder / _stem(protocol, defaults, dataclasses.asdict(options) | same)


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
    """Whether a file has the numbers of this very evaluation (or of none at all)."""
    try:
        before = json.loads(file.read_text())["about"]
        same = all(before[name] == about[name] for name in ("data", "test", "compare"))
        # In a run's own folder it does not matter by which path the run was named.
        same = same and (about["out"] is None or before["run"] == about["run"])
        changed = [_plain(changed_options(options, each)) for each in (before, about)]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return same and changed[0] == changed[1]


def _plain(value: Any) -> Any:
    """As it is read back from JSON."""
    return json.loads(json.dumps(value))


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "_".join(map(_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else _name(str(value))


def _name(path: str) -> str:
    return re.sub(r"\W+", "_", path.strip("/.")) or "data"

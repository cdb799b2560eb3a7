"""Where the numbers of an evaluation go: named after what was evaluated, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpm.evals.options import PROTOCOLS, EvalConfig

COMPARED = "compared"  # features of the run that --compare names
# What is evaluated, which names and tables tell by themselves.
WHAT = ("run", "data", "test", "compare", "teacher", "train_share")
# Where and how fast; of no influence on the numbers.
FREE = ("out", "workers", "device", "checkpoint_every")
LONGEST = 80  # characters of a file name that options take


def changed_options(protocol: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an evaluation (as in its JSON's `about`) that are not the defaults."""
    free = {*WHAT, *FREE} | (set() if protocol == "finetune" else {"batch_size"})
    return {
        field.name: about[field.name]
        for field in dataclasses.fields(PROTOCOLS[protocol])
        if field.name not in free
        and field.name in about
        and _plain(about[field.name]) != _plain(field.default)
    }


def result_file(config: EvalConfig, protocol: str, folder: Path) -> Path:
    """The JSON file for these numbers: that of the same evaluation, or one that is not there yet.

    Its name tells protocol, data and the options that are not the defaults (a digest of them where
    they are many); a number follows where another evaluation has that name.
    """
    about = dataclasses.asdict(config)
    stem = _stem(protocol, about)
    file, number = folder / f"{stem}.json", 1
    while file.exists() and not _holds(file, protocol, about):
        number += 1
        file = folder / f"{stem}_{number}.json"
    return file


def training_folder(config: EvalConfig, folder: Path) -> Path:
    """Where a fine-tuning keeps itself. Its name tells nothing of how it is tested, or beside what:
    with other such options the trained classifier is tested anew, not trained anew."""
    defaults = PROTOCOLS["finetune"]
    same = {"crop_share": defaults.crop_share, "baselines": defaults.baselines}
    return folder / _stem("finetune", dataclasses.asdict(config) | same)


def _stem(protocol: str, about: Mapping[str, Any]) -> str:
    parts = [protocol, _name(about["data"])]
    parts += ["teacher"] if about["teacher"] else []
    parts += ["on", _name(about["test"])] if about["test"] else []
    share = about.get("train_share", 1.0)
    parts += [f"share_{share:g}"] if share < 1 else []
    parts += ["less", _name(about["compare"])] if about["compare"] else []
    changed = changed_options(protocol, about)
    options = "_".join(f"{name}_{_text(value)}" for name, value in changed.items())
    if len(options) > LONGEST:
        options = f"options_{hashlib.sha256(options.encode()).hexdigest()[:8]}"
    return "_".join([*parts, *([options] if options else [])])


def _holds(file: Path, protocol: str, about: Mapping[str, Any]) -> bool:
    """Whether a file has the numbers of this very evaluation (or of none at all)."""
    try:
        before = json.loads(file.read_text())["about"]
        same = all(before[name] == about[name] for name in ("data", "test", "compare"))
        # In a run's own folder it does not matter by which path the run was named.
        same = same and (about["out"] is None or before["run"] == about["run"])
        options = [_plain(changed_options(protocol, each)) for each in (before, about)]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return same and options[0] == options[1]


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

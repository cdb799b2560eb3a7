"""Read the evaluations in a run folder: for its report, its model card, comparisons of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from hpm.evals.contract import COMPARED, installed_options
from hpm.evals.files import changed_options

# What evaluations and their numbers are called, where their name is not enough.
EVALUATIONS = {
    "knn": "kNN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "finetune": "fine-tuning",
    "segment": "segmentation",
    "detect": "detection",
    "stats": "statistics of the features",
}
NUMBERS = {
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_per_class": "mean per class, %",
    "mean_iou": "mean IoU, %",
    "mean_accuracy": "mean accuracy, %",
    "pixel_accuracy": "pixel accuracy, %",
    "rank": "effective rank",
    "of": "highest possible rank",
    "patch_similarity": "similarity of patches",
    "mining_accuracy": "teacher's ranking accuracy",
    "mining_correlation": "teacher's rank correlation",
    "hard_on_objects": "share of hardest patches on objects",
    "chance_on_objects": "share of all patches on objects",
}
PREDICTOR = "predictor and teacher"


class Row(NamedTuple):
    """The numbers of one kind of features, with NAME_low and NAME_high for intervals."""

    evaluation: str  # with its setting
    data: str
    features: str  # empty for numbers of the predictor and the teacher
    numbers: dict[str, float]
    options: str = ""  # those that are not the defaults
    paths: tuple[str, ...] = ()  # of the data, and of the test set where it is another

    @property
    def title(self) -> str:
        """The evaluation and its data, such as `linear probe on flowers`."""
        name, _, setting = self.evaluation.partition(", ")
        shown = ", ".join(filter(None, (evaluation_title(name), setting)))
        return f"{shown} on {self.data}"

    @property
    def words(self) -> list[str]:
        """Evaluation, data, features and numbers as text."""
        evaluation = ", ".join(filter(None, (self.evaluation, self.options)))
        return [evaluation, self.data, self.features, _words(self.numbers)]

    def named(self, names: Mapping[str, str]) -> Row:
        """With the names of `data_names` for its data."""
        return self._replace(data=", tested on ".join(names[path] for path in self.paths))

    @property
    def main(self) -> dict[str, tuple[float, float | None, float | None]]:
        """Number, low and high, by name: of accuracies only the first, otherwise all."""
        numbers = self.numbers
        names = [name for name in numbers if not name.endswith(("_low", "_high"))]
        if "top1" in numbers:
            names = ["top1"]
        return {
            name: (numbers[name], numbers.get(f"{name}_low"), numbers.get(f"{name}_high"))
            for name in names
        }


@dataclass
class Saved:
    """A result file: its weights (student or teacher) and step, if known, and its rows, or None if
    it cannot be read."""

    file: Path
    weights: str | None
    step: int | None
    rows: list[Row] | None

    @property
    def whose(self) -> str:
        """Weights and step in words."""
        return (self.weights or "") + ("" if self.step is None else f", step {self.step:,}")

    @property
    def words(self) -> list[list[str]]:
        """The rows as text."""
        unreadable = [[self.file.name, "", "", "unreadable"]]
        return unreadable if self.rows is None else [row.words for row in self.rows]


def saved_evaluations(run_folder: Path | None, folder: str = "evals") -> list[Saved]:
    """All of RUN/evals/*.json, by name."""
    files = sorted((run_folder / folder).glob("*.json")) if run_folder else []
    found = [_read(file) for file in files]
    names = data_names(row for saved in found for row in saved.rows or ())
    for saved in found:
        saved.rows = saved.rows and [row.named(names) for row in saved.rows]
    return found


def data_names(rows: Iterable[Row]) -> dict[str, str]:
    """A short name for each path of data: its last part, and as many before it as tell it from the
    others. A path that another one ends in may be the same data, written shorter."""
    parts = {path: PurePath(path).parts for row in rows for path in row.paths}

    def differ(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        shared = min(len(one), len(other))
        return one[-shared:] != other[-shared:]

    names = {}
    for path, own in parts.items():
        others = [other for other in parts.values() if differ(own, other)]
        enough = (
            length
            for length in range(1, len(own))
            if all(own[-length:] != other[-length:] for other in others)
        )
        names[path] = "/".join(own[-next(enough, len(own)) :])
    return names


def _read(file: Path) -> Saved:
    try:
        result = json.loads(file.read_text())
        about = result["about"]
        return Saved(file, about.get("weights"), about.get("step"), _rows(result))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Saved(file, None, None, None)


def _rows(result: dict[str, Any]) -> list[Row]:
    about, protocol = result["about"], result["protocol"]
    paths = tuple(str(Path(about[name])) for name in ("data", "test") if about.get(name))
    rows = []
    for features, settings in result["values"].items():
        if features.startswith(COMPARED):
            continue  # numbers of another run
        for setting, numbers in settings.items():
            name = protocol if setting == protocol else f"{protocol}, {setting}"
            rows.append(Row(name, "", features, numbers, _options(protocol, about), paths))
    if result["hardness"]:
        rows.append(Row(PREDICTOR, "", "", result["hardness"], paths=paths))
    return rows


def _options(protocol: str, about: dict[str, Any]) -> str:
    """Non-default options, except the k of kNN, which the setting names."""
    options = installed_options(protocol)
    changed = changed_options(options, about) if options else {}
    share = about.get("train_share", 1)
    changed |= {"train_share": share} if share != 1 else {}
    shown = {n: v for n, v in changed.items() if n not in ("k", "baselines")}
    return ", ".join(f"{name} {_value(value)}" for name, value in shown.items())


def _value(value: Any) -> str:
    """Values to choose from as `0.1/0.3`."""
    if isinstance(value, list):
        return "/".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words(numbers: dict[str, float]) -> str:
    if "top1" in numbers:
        low, high = numbers.get("top1_low"), numbers.get("top1_high")
        ends = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
        return f"top-1 {numbers['top1']:.1f}{ends}"
    return ", ".join(f"{number_title(name)} {value:.3g}" for name, value in numbers.items())


def evaluation_title(name: str) -> str:
    """What an evaluation is called."""
    return EVALUATIONS.get(name, name)


def number_title(name: str) -> str:
    """What a number of an evaluation is called."""
    return NUMBERS.get(name, name.replace("_", " "))

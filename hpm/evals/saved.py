"""Read the evaluations in a run folder: for its report, its model card, comparisons of runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
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
    return [_read(file) for file in files]


def _read(file: Path) -> Saved:
    try:
        result = json.loads(file.read_text())
        about = result["about"]
        return Saved(file, about.get("weights"), about.get("step"), _rows(result))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Saved(file, None, None, None)


def _rows(result: dict[str, Any]) -> list[Row]:
    about, protocol = result["about"], result["protocol"]
    data = Path(about["data"]).name
    data += f", tested on {Path(about['test']).name}" if about.get("test") else ""
    rows = []
    for features, settings in result["values"].items():
        if features.startswith(COMPARED):
            continue  # numbers of another run
        for setting, numbers in settings.items():
            name = protocol if setting == protocol else f"{protocol}, {setting}"
            rows.append(Row(name, data, features, numbers, _options(protocol, about)))
    if result["hardness"]:
        rows.append(Row(PREDICTOR, data, "", result["hardness"]))
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

"""Read the runs that a comparison draws: their names, options, numbers and evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.wording import of_clips, worded
from hpm.evals.contract import RAW_PIXELS, TRAINED
from hpm.evals.saved import Row, data_names, number_title, saved_evaluations
from hpm.mining.miner import tubes_of
from hpm.show.readings import read_metrics
from hpm.show.report import read_options
from hpm.show.status import read_status
from hpm.training.sessions import read_sessions
from hpm.weights.run_folder import RunFolder, latest_values, training_minutes

# Losses of runs that differ in one of these options, or in `hides_tubes`, cannot be compared.
LOSS_DEPENDS_ON = (
    "target",
    "target_model",
    "codebook",
    "target_options",
    "ranking_signal",
    "mask_ratio",
    "image_size",
    "frames",
    "frame_stride",
    "channels",
    "normalize",
    "pretrained",
)
DEPTH = 3  # folders below one that is named, in which runs are looked for
NUMBERS = {
    "reconstruction_loss": "reconstruction loss, training",
    "held_out/reconstruction_loss": "reconstruction loss, held-out images",
    "held_out/ranking_accuracy": "ranking accuracy, held-out images",
    "held_out/mining_accuracy": "teacher's ranking accuracy, held-out images",
    "probe/linear": "linear probe, %",
    "probe/knn": "kNN, %",
    "images_per_second": "images per second",
}


class Measure(NamedTuple):
    """One number of an evaluation. `features`: empty for numbers of predictor and teacher."""

    evaluation: str
    features: str
    name: str
    options: str

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.evaluation, self.features)))

    @property
    def about(self) -> str:
        return "; ".join(filter(None, (number_title(self.name), self.options)))

    @property
    def key(self) -> str:
        """What it is called among the keys to sort by."""
        return f"{self.title}: {self.about}"


Interval = tuple[float, float | None, float | None]  # a number, low and high


@dataclass
class ComparedRun:
    """A run folder, read. `label`: the part of its path that tells it from the others."""

    folder: Path
    label: str
    options: dict[str, Any]
    metrics: list[dict[str, Any]]
    progress: str
    evaluations: list[Row]

    @property
    def of_clips(self) -> bool:
        return of_clips(self.options)

    def numbers(self, clips: bool) -> dict[str, float]:
        """The latest value of each of NUMBERS, and the minutes of training, by title. clips: all
        that are compared are of clips."""
        last = latest_values(self.metrics)
        found = {worded(t, clips): last[name] for name, t in NUMBERS.items() if name in last}
        minutes = training_minutes(self.metrics, self.options.get("batch_size") or 0)
        return found | ({"minutes of training": minutes} if minutes else {})

    def measures(self) -> dict[Measure, Interval]:
        """The numbers of the run's own features. Raw pixels are among them."""
        found: dict[Measure, Interval] = {}
        for row in self.evaluations:
            features = row.features.removeprefix(f"{TRAINED}, ")
            if row.features and not row.features.startswith((TRAINED, RAW_PIXELS)):
                continue  # random weights
            for name, interval in row.main.items():
                found[Measure(row.title, features, name, row.options)] = interval
        return found


def read_runs(names: Sequence[str]) -> list[ComparedRun]:
    """The runs of these folders, and of all folders of runs among them.

    Raises UserError if one does not exist, or if there are fewer than two runs.
    """
    folders = list(dict.fromkeys(os.path.realpath(run) for name in names for run in _find(name)))
    if len(folders) < 2:
        found = f"only {names[0]} is one" if folders else "none of these folders is one"
        raise UserError(f"name at least two runs of hpm pretrain to compare: {found}")
    common = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    runs = [_read(Path(folder), os.path.relpath(folder, common)) for folder in folders]
    short = data_names(row for run in runs for row in run.evaluations)
    for run in runs:
        run.evaluations = [row.named(short) for row in run.evaluations]
    return runs


def differing_options(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """The options whose values differ, with the value of each run (None where it has none)."""
    names = dict.fromkeys(name for run in runs for name in run.options if name != "out")
    values = {name: [run.options.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if len({json.dumps(v) for v in each}) > 1}


def hides_tubes(options: Mapping[str, Any]) -> bool:
    """Whether a run with these options hides whole tubes of clips, in training and of held-out
    clips: they are harder than single patches. Runs of older versions may lack an option."""
    known = {name: options[name] for name in ("frames", "mask", "mine_tubes") if name in options}
    return tubes_of(PretrainConfig("", "", **known)) != "none"


def _find(name: str) -> list[Path]:
    """The run folder of this name, or the run folders below it, by name."""
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{name}: no such folder")
    file = RunFolder(path).config_file
    if file.is_file() or not path.is_dir():
        return [path] if file.is_file() else []
    below = ("/".join(["*"] * depth) for depth in range(1, DEPTH + 1))
    return sorted({config.parent for each in below for config in path.glob(f"{each}/{file.name}")})


def _read(folder: Path, label: str) -> ComparedRun:
    options, metrics = read_options(RunFolder(folder).config_file), read_metrics(folder)
    saved = [each for place in ("evals", "ablation") for each in saved_evaluations(folder, place)]
    rows = [row for each in saved if each.weights != "teacher" for row in each.rows or ()]
    words = read_status(folder, options, metrics, read_sessions(folder)).words
    return ComparedRun(folder, label, options, metrics, words, rows)

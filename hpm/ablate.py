"""`hpm ablate`: the same training with some options varied, over seeds, as a table and a figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from hpm import distributed
from hpm.checkpoint import write_atomically, write_text
from hpm.checks import check_pretrain
from hpm.config import AblateConfig, PretrainConfig, make_config
from hpm.data.sources import open_source
from hpm.errors import UserError
from hpm.evals import evaluate
from hpm.evals.features import labelled_splits
from hpm.logs import say
from hpm.pretrain import run_pretraining
from hpm.run import Run

Setting = dict[str, Any]
K = 20
FEATURES = "trained, patch mean"
# Options that belong to one target alone, and are left out where another one is tried.
OF_TARGET = {"target_model": "frozen", "codebook": "tokens"}
MEASURES = {
    "knn": "kNN", "linear": "linear probe", "ranking_accuracy": "ranking accuracy",
    "mining_accuracy": "mining accuracy", "loss": "loss", "minutes": "minutes",
}  # fmt: skip


def ablate(config: AblateConfig) -> Path:
    """See `_ablate`; all runs in one group of processes."""
    with distributed.process_group(distributed.pick_device(config.device)):
        return _ablate(config)


def _ablate(config: AblateConfig) -> Path:
    """Run every combination with every seed, and write `ablation.md`, `.csv` and `.png`.

    What is done already is not done again. Returns the table's path. Raises UserError before
    anything runs where a combination cannot work.
    """
    if config.seeds < 1:
        raise UserError(f"seeds is {config.seeds}; it must be at least 1")
    settings = combinations(config.vary)
    planned = [
        (setting, seed, run_config(config, setting, seed))
        for seed in range(config.seed, config.seed + config.seeds)
        for setting in settings
    ]
    labels, k = _labels(config)
    rows: list[dict[str, Any]] = []
    for number, (setting, seed, run) in enumerate(planned, 1):
        say(f"run {number} of {len(planned)}: {describe(setting)}, seed {seed}")
        run_pretraining(run)  # a finished one is left as it is, one of other options refused
        rows.append(setting | {"seed": seed} | measure(Path(run.out), labels, k, config))
        if distributed.is_main():
            write_results(config, settings, rows)
    return Path(config.out) / "ablation.md"


def combinations(vary: tuple[str, ...]) -> list[Setting]:
    """`("mask=random,hardest", "mask_ratio=0.5,0.75")` -> four settings. Raises UserError."""
    if not vary:
        raise UserError("name what to vary: --vary mask=random,easy_to_hard")
    options: dict[str, list[Any]] = {}
    for text in vary:
        name, given, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not given or not values.strip():
            raise UserError(f"vary '{text}': write an option and its values, mask=random,hardest")
        if name in options:
            raise UserError(f"vary: {name} is named twice; put all of its values in one")
        if name in ("seed", "out", "data"):
            raise UserError(f"vary: {name} cannot be varied; --seeds says over how many seeds")
        try:
            options[name] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise UserError(f"vary '{text}': the values are not a list") from None
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def run_config(config: AblateConfig, setting: Setting, seed: int) -> PretrainConfig:
    """The run of one setting and seed, checked."""
    names = [field.name for field in dataclasses.fields(PretrainConfig)]
    options = {name: getattr(config, name) for name in names} | setting
    for name, target in OF_TARGET.items():
        if options["target"] != target and name not in setting:
            options[name] = None
    out = Path(config.out) / describe(setting).replace(", ", "_").replace("/", "-")
    options |= {"seed": seed, "out": str(out / f"seed_{seed}")}
    try:
        run = make_config(PretrainConfig, options)
        check_pretrain(run)
    except UserError as error:
        raise UserError(f"{describe(setting)}: {error}") from None
    return run


def describe(setting: Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def measure(folder: Path, labels: str | None, k: int, config: AblateConfig) -> dict[str, float]:
    """The numbers of a finished run; the evaluations are done where they are not yet."""
    values: dict[str, float] = {}
    batch_size = yaml.safe_load(Run(folder).config_file.read_text())["batch_size"]
    for protocol in ("knn", "linear") if labels is not None else ():
        assert labels is not None
        options: dict[str, Any] = {"baselines": False, "out": str(folder / "ablation")}
        options |= {"k": (k,)} if protocol == "knn" else {}
        found = _measured(folder, protocol, labels, options)
        if found is None:
            how: dict[str, Any] = {
                "workers": config.workers,
                "device": config.device,
                "report": say,
            }
            found = evaluate(protocol, str(folder), labels, **how, **options).values
        setting = f"k = {k}" if protocol == "knn" else protocol
        values[protocol] = found[FEATURES][setting]["top1"]
    lines = Run(folder).metrics()
    last = {name: value for line in lines for name, value in line.items()}
    for name in ("ranking_accuracy", "mining_accuracy"):
        if f"held_out/{name}" in last:
            values[name] = last[f"held_out/{name}"]
    values["loss"] = last["reconstruction_loss"]
    values["minutes"] = _minutes(lines, batch_size)
    return values


def _measured(
    folder: Path, protocol: str, labels: str, options: dict[str, Any]
) -> dict[str, Any] | None:
    """The values of an earlier evaluation, if it was this one."""
    for file in (folder / "ablation").glob(f"{protocol}_*.json"):
        found = json.loads(file.read_text())
        asked = json.loads(json.dumps(options)) | {"data": labels}
        if all(found["about"].get(name) == value for name, value in asked.items()):
            return found["values"]
    return None


def write_results(config: AblateConfig, settings: list[Setting], rows: list[Setting]) -> None:
    """The table as Markdown, every run as CSV, the accuracies (or losses) as a figure."""
    folder = Path(config.out)
    measures = [name for name in MEASURES if any(name in row for row in rows)]
    head = [*settings[0], "seeds", *[MEASURES[name] for name in measures]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for setting in settings:
        own = [row for row in rows if all(row[n] == v for n, v in setting.items())]
        cells = [*map(str, setting.values()), str(len(own))]
        cells += [_spread([row[m] for row in own if m in row], m) for m in measures]
        lines.append("| " + " | ".join(cells) + " |")
    write_text(folder / "ablation.md", "\n".join(lines) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, [*settings[0], "seed", *measures], restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "ablation.csv", text.getvalue())
    accuracies = [name for name in measures if name in ("knn", "linear")]
    _draw(settings, rows, accuracies or ["loss"], folder / "ablation.png")


def _draw(settings: list[Setting], rows: list[Setting], measures: list[str], path: Path) -> None:
    """A panel per measure: a dot per seed, a bar at the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (3 + 3.2 * len(measures), 1 + 0.35 * len(settings))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, measure_name in zip(panels, measures, strict=True):
        for y, setting in enumerate(settings):
            own = [row for row in rows if all(row[n] == v for n, v in setting.items())]
            values = [row[measure_name] for row in own if measure_name in row]
            if values:
                panel.plot(values, [y] * len(values), "o", color="#4477aa", alpha=0.8)
                panel.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color="black")
        panel.set_yticks(range(len(settings)), [describe(setting) for setting in settings])
        unit = "" if measure_name == "loss" else ", top-1 in %"
        panel.set_xlabel(MEASURES[measure_name] + unit)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _labels(config: AblateConfig) -> tuple[str | None, int]:
    """(labelled images to measure on, number of neighbours), checked before anything runs."""
    data = config.labels or config.data
    splits = open_source(data)
    if splits.train.labels is None and config.labels is None:
        say(f"{data} has no labels, so no accuracy is measured; --labels names images that have")
        return None, 0
    labelled = labelled_splits(splits, config.seed)
    return data, min(K, len(labelled.train))


def _minutes(lines: list[dict[str, Any]], batch_size: int) -> float:
    """Of training alone, from the speeds that were read."""
    seconds, before = 0.0, 0
    for line in lines:
        if "images_per_second" in line:
            seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return seconds / 60


def _spread(values: list[float], measure_name: str) -> str:
    if not values:
        return ""
    digits = {"knn": 1, "linear": 1, "minutes": 1}.get(measure_name, 3)
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

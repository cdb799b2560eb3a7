"""Evaluations: features in, named numbers out."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hpm.checkpoint import write_text
from hpm.config import EvalConfig, make_config
from hpm.data.sources import Source, Splits, Subset, open_source
from hpm.distributed import pick_device
from hpm.errors import UserError, nearest
from hpm.evals.features import extract, labelled_splits, raw_pixels
from hpm.evals.hardness import measure
from hpm.evals.knn import knn
from hpm.models.build import build_encoder
from hpm.run import Backbone, Trained, load

PROTOCOLS = ("knn", "hardness")
HARDNESS_IMAGES = 256

Report = Callable[[str], None]


@dataclass
class Result:
    """Numbers of one evaluation: `values[what was evaluated][measure]`."""

    protocol: str
    about: dict[str, Any]
    values: dict[str, dict[str, float]]
    hardness: dict[str, float] = field(default_factory=dict)
    file: Path | None = None

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            print_result(self, console)
        return capture.get().rstrip()


def evaluate(
    protocol: str, run: str, data: str, report: Report | None = None, **options: Any
) -> Result:
    """Evaluate a backbone: `hpm.evaluate("knn", "runs/first", "flowers/")`.

    Options are those of `config.EvalConfig`. The result is also written as JSON into the run
    folder. `report` is called with each line on what was passed over. Raises UserError on bad
    input.
    """
    if protocol not in PROTOCOLS:
        raise UserError(
            f"no evaluation '{protocol}'{nearest(protocol, PROTOCOLS)} (there is {PROTOCOLS})"
        )
    config = make_config(EvalConfig, {"run": str(run), "data": str(data), **options})
    if config.temperature <= 0 or config.batch_size < 1 or min(config.k, default=0) < 1:
        raise UserError("temperature, batch_size and every k must be positive")
    start = time.perf_counter()
    trained = load(config.run)
    device = pick_device(config.device)
    splits = open_source(config.data)
    if config.test:
        splits = Splits(splits.train, open_source(config.test).train)
    values: dict[str, dict[str, float]] = {}
    if protocol == "knn":
        values = _knn(trained, splits, config, device, report or print)
    hard = _hardness(trained, splits.test or splits.train, config, device)
    if protocol == "hardness" and not hard:
        raise UserError(f"{config.run} has no loss predictor, so there is nothing to measure")
    about = {
        "run": config.run,
        "weights": "teacher" if config.teacher else "student",
        "data": config.data,
        "test": config.test,
        "temperature": config.temperature,
        "seconds": round(time.perf_counter() - start, 1),
    }
    result = Result(protocol, about, values, hard)
    if trained.folder is not None:
        name = re.sub(r"\W+", "_", config.data.strip("/.")) or "data"
        weights = "_teacher" if config.teacher else ""
        result.file = trained.folder / "evals" / f"{protocol}_{name}{weights}.json"
        content = {"about": about, "values": values, "hardness": hard}
        write_text(result.file, json.dumps(content, indent=2) + "\n")
    return result


def print_result(result: Result, console: Console) -> None:
    """A table of the numbers and a line on the hard patches."""
    if result.values:
        measures = list(next(iter(result.values.values())))
        about = result.about
        console.print(
            f"top-1 of {result.protocol} in %, {about['run']} on {about['data']}", soft_wrap=True
        )
        table = Table()
        table.add_column("features", no_wrap=True)
        for measure in measures:
            table.add_column(measure.replace("knn_", "k = "), justify="right")
        for name, numbers in result.values.items():
            table.add_row(name, *[f"{numbers[m]:.1f}" for m in measures])
        console.print(table)
    hard = result.hardness
    if hard:
        console.print(
            f"predictor, on hidden patches: ranking accuracy {hard['ranking_accuracy']:.3f} "
            f"(0.5 is chance), rank correlation {hard['rank_correlation']:.3f}\n"
            f"teacher, on whole images:     ranking accuracy {hard['mining_accuracy']:.3f} "
            f"(0.5 is chance), rank correlation {hard['mining_correlation']:.3f}",
            soft_wrap=True,
        )
    if "hard_on_objects" in hard:
        console.print(
            f"of the quarter predicted hardest, {100 * hard['hard_on_objects']:.0f} % lies on "
            f"objects ({100 * hard['chance_on_objects']:.0f} % by chance)",
            soft_wrap=True,
        )


def _knn(
    trained: Trained, splits: Splits, config: EvalConfig, device: torch.device, report: Report
) -> dict[str, dict[str, float]]:
    data = labelled_splits(splits, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        random_encoder = build_encoder(trained.architecture)
    backbones = {
        "trained": trained.backbone(teacher=config.teacher).to(device).eval(),
        "random weights": Backbone(random_encoder, trained.mean, trained.std).to(device).eval(),
    }

    @torch.inference_mode()
    def embed(images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name, backbone in backbones.items():
            tokens = backbone.tokens(images.to(device))
            features[f"{name}, class token"] = tokens[:, 0]
            features[f"{name}, mean of patches"] = tokens[:, 1:].mean(1)
        return features | {"raw pixels": raw_pixels(images)}

    size, channels = tuple(trained.architecture["image_size"]), trained.architecture["channels"]
    train = extract(embed, data.train, data.train_labels, size, channels, config.batch_size, report)
    test = extract(embed, data.test, data.test_labels, size, channels, config.batch_size, report)
    count = len(train["raw pixels"].labels)
    if count < min(config.k):
        raise UserError(f"k {min(config.k)} is more than the {count} training images")
    if not all(found.features.isfinite().all() for found in train.values()):
        raise UserError(f"{trained.name}: the features are not finite; the run has diverged")
    return {
        name: dict(knn(train[name], test[name], len(data.classes), config.k, config.temperature))
        for name in train
    }


def _hardness(
    trained: Trained, source: Source, config: EvalConfig, device: torch.device
) -> dict[str, float]:
    if trained.model is None or trained.teacher is None or trained.model.predictor is None:
        return {}
    if len(source) > HARDNESS_IMAGES:
        rng = np.random.default_rng([config.seed, len(source)])
        source = Subset(source, np.sort(rng.permutation(len(source))[:HARDNESS_IMAGES]))
    return measure(trained, source, device, config.seed)

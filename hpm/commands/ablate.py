"""`hpm ablate`: train with varied options and seeds; write tables and a figure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpm.commands.ablation_plan import PlannedRun, make_plan
from hpm.commands.ablation_results import Results
from hpm.commands.options import AblateConfig, SeedOptions
from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.progress import say
from hpm.data.fingerprint import Fingerprint, annotated
from hpm.data.sources import open_source
from hpm.evals import evaluate
from hpm.evals.features import labelled_splits
from hpm.models.architecture import resolve_model
from hpm.pretraining import run_pretraining
from hpm.show.compared import LOSS_DEPENDS_ON, hides_tubes
from hpm.show.comparison import compare
from hpm.show.options import CompareConfig
from hpm.targets.registry import find_target
from hpm.weights.run_folder import RunFolder, training_minutes

K = 20
FEATURES = "trained, patch mean"


@dataclass(frozen=True)
class Labels:
    """Labelled data to evaluate on, and the number of neighbours.

    fingerprints: of its splits and their labels, by which changed data is noticed.
    """

    data: str
    k: int
    fingerprints: list[Fingerprint]


def ablate(config: AblateConfig) -> Results:
    """Run every arm with every combination and seed; write `ablation.md`, `.csv` and `.png`, and
    the runs beside each other in `compare.html`.

    Finished runs and evaluations are not repeated. Raises UserError before training if a
    combination cannot work.
    """
    # All runs share one process group.
    with distributed.process_group(distributed.pick_device(config.device)):
        variants, runs = make_plan(config)
        results = Results(Path(config.out), variants)
        train_and_measure(config, runs, results)
    return results


def train_and_measure(config: SeedOptions, runs: list[PlannedRun], results: Results) -> None:
    """Run the plan as far as it has not been run yet. Writes the results after each run, and the
    page of the comparison at the end. All processes call it."""
    labels = _labels(config, clips=any(run.config.frames > 1 for run in runs))
    with_loss = losses_compare([run.config for run in runs])
    for number, run in enumerate(runs, 1):
        say(f"run {number} of {len(runs)}: {run.variant}, seed {run.config.seed}")
        run_pretraining(run.config)  # returns at once if finished; raises if its options differ
        values = measure(run, labels)
        if not with_loss:
            values.pop("held_out_loss", None)
        results.add(run.variant, run.config.seed, values)
        if distributed.is_main():
            results.write()
    if distributed.is_main() and len(runs) > 1:
        page, folders = str(results.folder / "compare.html"), [run.config.out for run in runs]
        compare(CompareConfig(tuple(folders), page, config.data, device=config.device))


def losses_compare(runs: list[PretrainConfig]) -> bool:
    """Whether held-out losses can be compared. All are measured with random masks, of single
    patches or of tubes."""
    kinds = {
        str(
            [
                resolve_model(run).patch_size,
                hides_tubes(vars(run)),
                *[getattr(run, name) for name in LOSS_DEPENDS_ON],
            ]
        )
        for run in runs
    }
    # Targets made from the teacher's features differ between runs.
    return len(kinds) == 1 and not find_target(runs[0].target).needs_teacher


def measure(run: PlannedRun, labels: Labels | None) -> dict[str, float]:
    """The numbers of a finished run, which is evaluated unless it already has been.

    Without labels: effective rank of the features, and similarity of an image's patches.
    """
    folder, values = Path(run.config.out), {}
    if labels is None:
        found = _evaluation(run, "stats", run.config.data)[FEATURES]["stats"]
        values = {name: found[name] for name in ("rank", "patch_similarity")}
    else:
        data, prints = labels.data, labels.fingerprints
        found = _evaluation(run, "knn", data, prints, k=(labels.k,))[FEATURES]
        values["knn"] = found[f"k = {labels.k}"]["top1"]
        values["linear"] = _evaluation(run, "linear", data, prints)[FEATURES]["linear"]["top1"]
    lines = RunFolder(folder).metrics()
    last = {name: value for line in lines for name, value in line.items()}
    for name, measured in (
        ("ranking_accuracy", "held_out/ranking_accuracy"),
        ("mining_accuracy", "held_out/mining_accuracy"),
        ("held_out_loss", "held_out/reconstruction_loss"),
    ):
        if measured in last:
            values[name] = last[measured]
    batch_size = yaml.safe_load(RunFolder(folder).config_file.read_text())["batch_size"]
    values["minutes"] = training_minutes(lines, batch_size)
    return values


def _evaluation(
    run: PlannedRun,
    protocol: str,
    data: str,
    fingerprints: list[Fingerprint] | None = None,
    **options: Any,
) -> Any:
    """The values of an evaluation of the run: read from its file, or computed now."""
    folder = Path(run.config.out)
    settings: dict[str, Any] = {"baselines": False, "out": str(folder / "ablation")} | options
    wanted = json.loads(json.dumps(settings)) | {"data": data, "fingerprints": fingerprints}
    for file in (folder / "ablation").glob(f"{protocol}_*.json"):
        saved = json.loads(file.read_text())
        if all(saved["about"].get(name) == value for name, value in wanted.items()):
            return saved["values"]
    settings |= {"workers": run.config.workers, "device": run.config.device}
    result = evaluate(protocol, str(folder), data, report=say, **settings)
    if result.file and distributed.is_main():
        result.about["fingerprints"] = fingerprints
        result.save(result.file)
    return result.values


def _labels(config: SeedOptions, clips: bool) -> Labels | None:
    """The labelled data, if there is any; checked before training. clips: whether the runs are of
    clips."""
    data = config.labels or config.data
    splits = open_source(data, clips=clips)
    if splits.train.labels is None and config.labels is None:
        say(
            f"{data} has no labels: comparing effective rank and similarity of patches instead of "
            "accuracy; pass labelled images with --labels"
        )
        return None
    count = len(labelled_splits(splits, config.seed).train)
    parts = [part for part in (splits.train, splits.test) if part]
    prints = distributed.main_first(lambda: [annotated(part) for part in parts])
    return Labels(data, min(K, count), prints)

"""Does mining help? MAE, the predictor's loss alone, and Hard Patches Mining, on the same data.

    python benchmarks/methods.py flowers --minutes 9      # again and again, until it says done
    python benchmarks/methods.py cifar10 --minutes 9

Every step is a command of `hpm` in a separate process, several in parallel (on a GPU, try
--side-by-side 8). Runs that exceed the time limit save and are resumed by the next call. Stages: a
grid of learning rates and targets, the same for each method, evaluated by a linear probe on a
held-out part of the *training* labels; the speed of each method in its best setting; then all
methods over the seeds, at equal epochs and at equal wall-clock time, measured by kNN, linear probe
and fine-tuning on the test split. Writes a table into RESULTS.md and a figure beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from results import machine, spread, table, write_section

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data"

METHODS = {
    "MAE": {"mask": "random", "predictor_loss": "none"},
    "predictor": {"mask": "random", "predictor_loss": "relative"},
    "HPM": {"mask": "easy_to_hard", "predictor_loss": "relative"},
}
GRID = {"base_lr": (2e-3, 4e-3, 8e-3), "target": ("pixels", "normalized_pixels")}
PROTOCOLS = {"knn": "kNN, k = 20", "linear": "linear probe", "finetune": "fine-tuning"}
TUNING_SEED = 100  # none of those that are reported

COMMON = {
    "model": "vit_nano",
    "batch_size": 64,
    "holdout": 64,
    "eval_every": "100%",
    "log_every": 20,
    "workers": 0,
    "keep_checkpoints": 1,
}
# At this scale the strong augmentation of the full recipe only slows learning down.
FINETUNE = {
    "epochs": 10,
    "batch_size": 64,
    "base_lr": 4e-3,
    "mixup": 0,
    "cutmix": 0,
    "rand_augment": "none",
    "random_erase": 0,
    "crop_scale": "[0.2,1.0]",
}


@dataclass(frozen=True)
class Dataset:
    """Where the images are, what is trained on them, and how the features are measured."""

    data: str
    train: str  # the training split alone: what tuning may see
    options: dict
    epochs: int
    labels: dict  # of the probes and of fine-tuning


DATASETS = {
    "flowers": Dataset("flowers", "flowers/train", {"image_size": 64, "patch_size": 8}, 20, {}),
    "cifar10": Dataset(
        "cifar10",
        "cifar10/train-00000-of-00001.parquet",
        {"image_size": 32, "patch_size": 4},
        2,
        {"train_share": 0.1},
    ),
}


@dataclass(frozen=True)
class Arm:
    """A row of the table: a method and how long it trains."""

    name: str
    method: str
    epochs: int
    protocols: tuple[str, ...] = ("knn", "linear", "finetune")


@dataclass(frozen=True)
class Job:
    """One command of hpm, the file (a pattern) that is there once it is done, and its log."""

    arguments: tuple[str, ...]
    folder: Path
    pattern: str
    log: Path

    @property
    def result(self) -> Path | None:
        return next(self.folder.glob(self.pattern), None)


class Experiment:
    """The jobs of one data set. Each stage needs the results of those before it."""

    def __init__(self, name: str, out: Path, seeds: int, epochs: int | None, side_by_side: int):
        self.name, self.dataset, self.out = name, DATASETS[name], out / name
        self.seeds, self.side_by_side = range(seeds), side_by_side
        self.epochs = epochs or self.dataset.epochs

    def run(self, deadline: float) -> bool:
        """True once all is done."""
        stages = (self.tuning, self.tuning_probes, self.timing, self.pretraining, self.evaluation)
        for stage in stages:
            title = (stage.__doc__ or "").splitlines()[0]
            print(f"{self.name}: {title}", flush=True)
            if not run_all(stage(), self.side_by_side, deadline):
                return False
        return True

    def tuning(self) -> list[Job]:
        """tuning: every method with every setting, at half of the length"""
        return [
            self._pretrain(
                self._tuning_run(method, setting),
                METHODS[method] | setting,
                TUNING_SEED,
                max(1, self.epochs // 2),
            )
            for setting in settings()
            for method in METHODS
        ]

    def tuning_probes(self) -> list[Job]:
        """tuning: a linear probe of each, on a part of the training labels"""
        return [
            self._tuning_probe(method, setting) for method, setting in product(METHODS, settings())
        ]

    def timing(self) -> list[Job]:
        """timing: short runs of each method in turns, as many side by side as in earnest"""
        return [
            self._pretrain(
                self.out / "timing" / f"{method}_{turn}_{copy}",
                METHODS[method]
                | self.best(method)
                | {"holdout": 0, "hard_share_start": 0.25, "log_every": 5, "steps": 40},
                TUNING_SEED,
                1,
            )
            for turn, method, copy in product(range(3), METHODS, range(self.side_by_side))
        ]

    def pretraining(self) -> list[Job]:
        """training: every method at its best setting, over the seeds"""
        return [
            self._pretrain(
                self._run(arm, seed), METHODS[arm.method] | self.best(arm.method), seed, arm.epochs
            )
            for seed in self.seeds
            for arm in self.arms()
        ]

    def evaluation(self) -> list[Job]:
        """evaluation: kNN, linear probe and fine-tuning, on the test split"""
        return [
            self._evaluate(protocol, arm, seed)
            for protocol, seed, arm in product(PROTOCOLS, self.seeds, self.arms())
            if protocol in arm.protocols
        ]

    def best(self, method: str) -> dict:
        """The setting that the held-out part of the training labels prefers."""
        return max(settings(), key=lambda setting: self.tuned(method, setting))

    def tuned(self, method: str, setting: dict) -> float:
        """What it is judged by: top-1 of the linear probe on the mean of patches."""
        return read_top1(self._tuning_probe(method, setting), "linear", "trained, patch mean")

    def speeds(self) -> dict[str, list[float]]:
        """Images per second of each timing run."""
        speeds: dict[str, list[float]] = {method: [] for method in METHODS}
        for run in sorted((self.out / "timing").glob("*_*_*/metrics.jsonl")):
            rates = [json.loads(line).get("images_per_second") for line in run.open()]
            method = run.parent.name.split("_")[0]
            speeds[method].append(statistics.median(r for r in rates[2:] if r))
        return speeds

    def arms(self) -> list[Arm]:
        """All methods at equal epochs, and the cheaper ones for as long as HPM takes."""
        speed = {method: statistics.median(values) for method, values in self.speeds().items()}
        arms = [Arm(method, method, self.epochs) for method in METHODS]
        for method in list(METHODS)[:-1]:
            epochs = round(self.epochs * speed[method] / speed["HPM"])
            # Fine-tuning costs more than all of the training here: at equal epochs alone.
            arms.append(Arm(f"{method}, HPM's time", method, epochs, ("knn", "linear")))
        return arms

    def _run(self, arm: Arm, seed: int) -> Path:
        return self.out / f"{arm.method}_{arm.epochs}_epochs_seed_{seed}"

    def _tuning_run(self, method: str, setting: dict) -> Path:
        return self.out / "tuning" / "_".join([method, *map(str, setting.values())])

    def _pretrain(self, run: Path, options: dict, seed: int, epochs: int) -> Job:
        options = COMMON | self.dataset.options | options
        options |= {"seed": seed, "epochs": epochs, "out": run}
        command = ("pretrain", str(DATA / self.dataset.data), *as_arguments(options))
        return Job(command, run, "backbone.safetensors", run.with_name(run.name + ".log"))

    def _tuning_probe(self, method: str, setting: dict) -> Job:
        run = self._tuning_run(method, setting)
        options = {"baselines": "false", "workers": 0, "out": run / "evals"}
        data = str(DATA / self.dataset.train)
        command = ("eval", "linear", str(run), data, *as_arguments(options | self.dataset.labels))
        return Job(command, run / "evals", "linear_*.json", run.with_name(run.name + ".log"))

    def _evaluate(self, protocol: str, arm: Arm, seed: int) -> Job:
        run = self._run(arm, seed)
        # The baselines know nothing of the arm: once for each seed is enough.
        options = {"baselines": str(arm.name == "MAE").lower(), "workers": 0, "seed": seed}
        options |= {"out": run / "evals"} | self.dataset.labels
        options |= FINETUNE if protocol == "finetune" else {}
        data = str(DATA / self.dataset.data)
        command = ("eval", protocol, str(run), data, *as_arguments(options))
        return Job(command, run / "evals", f"{protocol}_*.json", run.with_name(run.name + ".log"))

    # Results.

    def top1(self, protocol: str, arm: Arm, name: str = "trained") -> list[float]:
        """One number per seed, of the trained weights or of a baseline."""
        features = features_of(protocol, name)
        return [read_top1(self._evaluate(protocol, arm, s), protocol, features) for s in self.seeds]

    def report(self) -> None:
        """Write the section of RESULTS.md and the figure."""
        arms = self.arms()
        found = {arm.name: {p: self.top1(p, arm) for p in arm.protocols} for arm in arms}
        for name in ("random weights", "raw pixels"):
            found[name] = {p: self.top1(p, arms[0], name) for p in PROTOCOLS}
        epochs = {arm.name: str(arm.epochs) for arm in arms}
        rows = [
            [name, epochs.get(name, ""), *[spread(values.get(p, [])) for p in PROTOCOLS]]
            for name, values in found.items()
        ]
        gains = [
            [
                f"{one} minus {other}",
                *[gain(found[one][p], found[other].get(p, [])) for p in PROTOCOLS],
            ]
            for one, other in (
                ("predictor", "MAE"),
                ("HPM", "predictor"),
                ("HPM", "MAE"),
                ("HPM", "predictor, HPM's time"),
                ("HPM", "MAE, HPM's time"),
            )
        ]
        tuned = [
            [f"{s['base_lr']:g}, {s['target']}", *[f"{self.tuned(m, s):.1f}" for m in METHODS]]
            for s in settings()
        ]
        speeds = ", ".join(f"{method} {spread(values)}" for method, values in self.speeds().items())
        figure = FOLDER / f"methods_{self.name}.png"
        draw(found, self.name, figure)
        options, titles = self.dataset.options, list(PROTOCOLS.values())
        share = self.dataset.labels.get("train_share", 1)
        text = f"""
## Does mining help? {self.name}

`python benchmarks/methods.py {self.name} --seeds {len(self.seeds)} --epochs {self.epochs}
--side-by-side {self.side_by_side}` on {machine()}.

{COMMON["model"]}, {options["image_size"]} px, patches of {options["patch_size"]}, mask ratio 0.75,
{len(self.seeds)} seeds, labels of {100 * share:g} % of the training images; top-1 in %, mean ±
standard deviation over the seeds. kNN and linear probe read the mean of the patches.

{table(["", "epochs", *titles], rows)}

Differences, seed by seed, in points:

{table(["", *titles], gains)}

Tuning: {max(1, self.epochs // 2)} epochs, another seed, linear probe on a held-out fifth of the
training labels. Each method then ran at its own best of (base learning rate, target):

{table(["", *METHODS], tuned)}

Images per second of each of {self.side_by_side} processes side by side: {speeds}.

![top-1 by method]({figure.name})
"""
        write_section(f"methods {self.name}", text)


def settings() -> list[dict]:
    return [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]


def as_arguments(options: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def read_top1(job: Job, protocol: str, features: str) -> float:
    assert job.result, f"not done: {job.arguments}"
    values = json.loads(job.result.read_text())["values"][features]
    return values["k = 20" if protocol == "knn" else protocol]["top1"]


def features_of(protocol: str, name: str) -> str:
    """The protocol's name for the features of `trained` or of a baseline."""
    if name == "raw pixels":
        return "raw pixels (linear)" if protocol == "finetune" else name
    return name if protocol == "finetune" else f"{name}, patch mean"


def gain(ours: list[float], theirs: list[float]) -> str:
    if not theirs:
        return "–"
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return ("+" if statistics.mean(differences) > 0 else "") + spread(differences)


def draw(found: dict, name: str, file: Path) -> None:
    """One panel per protocol: a dot per seed, a bar at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.8), sharey=True, layout="constrained")
    for panel, (protocol, title) in zip(panels, PROTOCOLS.items(), strict=True):
        for row, values in enumerate(found.values()):
            if protocol not in values:
                continue
            panel.plot(values[protocol], [row] * len(values[protocol]), "o", color="#4477aa")
            panel.plot([statistics.mean(values[protocol])] * 2, [row - 0.3, row + 0.3], color="k")
        panel.set_title(title)
        panel.set_xlabel("top-1 in %")
        panel.set_yticks(range(len(found)), list(found))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.suptitle(f"{name}: a dot per seed, a bar at their mean")
    figure.savefig(file, dpi=150)


def run_all(jobs: list[Job], side_by_side: int, deadline: float) -> bool:
    """Run open jobs, several in parallel. Returns False if the time ran out."""
    waiting = [job for job in dict.fromkeys(jobs) if not job.result]
    running: dict[Job, subprocess.Popen] = {}
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    total = len(waiting)
    while waiting or running:
        if time.time() > deadline:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            return False
        while waiting and len(running) < side_by_side:
            job = waiting.pop(0)
            command = [sys.executable, "-m", "hpm", *job.arguments]
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "a") as log:
                running[job] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        time.sleep(0.2)
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                if process.returncode:
                    log_tail = job.log.read_text()[-2000:]
                    sys.exit(f"failed: hpm {' '.join(job.arguments)}\n{log_tail}")
                print(f"{total - len(waiting) - len(running)} of {total}: {job.result}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--minutes", type=float, default=9, help="of this piece")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--side-by-side", type=int, default=2)
    chosen = parser.parse_args()
    experiment = Experiment(
        chosen.dataset, chosen.out, chosen.seeds, chosen.epochs, chosen.side_by_side
    )
    if not experiment.run(time.time() + 60 * chosen.minutes):
        print("time is up: run the same command again to resume")
        return
    experiment.report()
    print("done: benchmarks/RESULTS.md")


if __name__ == "__main__":
    main()

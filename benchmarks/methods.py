"""Does mining help? MAE, the predictor's loss alone, and Hard Patches Mining, on the same data.

    python benchmarks/methods.py flowers --minutes 9      # again and again, until it says done
    python benchmarks/methods.py cifar10 --minutes 9

Everything is a command of `hpm`, run in a process of its own, several side by side. What is done
stays done: a piece that runs out of time saves and the next one goes on. In order: the speed of
each method (interleaved), a grid of learning rates and targets for each method alike, judged by a
linear probe on a held-out part of the *training* labels, then all methods at their best, over
seeds, at equal epochs and at equal wall-clock time; kNN, linear probe and fine-tuning on the test
split. The table goes into benchmarks/RESULTS.md, the figure beside it.
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

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data"

METHODS = {
    "MAE": {"mask": "random", "predictor_loss": "none"},
    "predictor": {"mask": "random", "predictor_loss": "relative"},
    "HPM": {"mask": "easy_to_hard", "predictor_loss": "relative"},
}
GRID = {"base_lr": (2e-3, 4e-3, 8e-3), "target": ("pixels", "normalized_pixels")}
TUNING_SEED = 100  # none of those that are reported

COMMON = {
    "model": "vit_nano", "batch_size": 64, "holdout": 64, "eval_every": "100%",
    "log_every": 20, "workers": 0, "keep_checkpoints": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """Where the images are, what is trained on them, and how the features are measured."""

    data: str
    train: str  # the training split alone: what tuning may see
    options: dict
    epochs: int
    finetune: dict


DATASETS = {
    "flowers": Dataset(
        "flowers", "flowers/train", {"image_size": 64, "patch_size": 8}, 20,
        {"epochs": 10, "batch_size": 64},
    ),
    "cifar10": Dataset(
        "cifar10", "cifar10/train.parquet", {"image_size": 32, "patch_size": 4}, 2,
        {"epochs": 5, "batch_size": 64, "train_share": 0.1},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One command of hpm, the file that is there once it is done, and where it says what."""

    arguments: tuple[str, ...]
    done: Path
    log: Path


class Experiment:
    """The jobs of one data set, in the order in which they can be done."""

    def __init__(self, name: str, out: Path, seeds: int, epochs: int | None):
        self.name, self.dataset, self.out, self.seeds = name, DATASETS[name], out / name, seeds
        self.epochs = epochs or self.dataset.epochs
        self.out.mkdir(parents=True, exist_ok=True)

    # Each stage needs the results of those before it.

    def tuning(self) -> list[Job]:
        """Every method with every setting, at half of the length."""
        return [
            self._pretrain(self._tuning_run(method, setting), METHODS[method] | setting,
                           TUNING_SEED, max(1, self.epochs // 2))
            for setting in settings() for method in METHODS
        ]  # fmt: skip

    def _tuning_run(self, method: str, setting: dict) -> Path:
        return self.out / "tuning" / "_".join([method, *map(str, setting.values())])

    def _pretrain(self, run: Path, options: dict, seed: int, epochs: int) -> Job:
        options = COMMON | self.dataset.options | options
        options |= {"seed": seed, "epochs": epochs, "out": run}
        data = str(DATA / self.dataset.data)
        done, log = run / "backbone.safetensors", run.with_name(run.name + ".log")
        return Job(("pretrain", data, *as_arguments(options)), done, log)

    def timing(self, deadline: float) -> dict[str, float]:
        """Images per second of each method, short runs in turns with nothing beside them."""
        file = self.out / "timing.json"
        if not file.exists():
            speeds: dict[str, list[float]] = {method: [] for method in METHODS}
            for turn, method in product(range(3), METHODS):
                run = self.out / "timing" / f"{method}_{turn}"
                options = METHODS[method] | {"holdout": 0, "hard_share_start": 0.25, "log_every": 5}
                job = self._pretrain(run, options | {"steps": 40}, TUNING_SEED, 1)
                run_all([job], 1, deadline)
                lines = (run / "metrics.jsonl").read_text().splitlines()
                rates = [json.loads(line).get("images_per_second") for line in lines]
                speeds[method].append(statistics.median(r for r in rates[2:] if r))
            file.write_text(json.dumps(speeds, indent=2) + "\n")
        speeds = json.loads(file.read_text())
        return {method: statistics.median(values) for method, values in speeds.items()}


def settings() -> list[dict]:
    return [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]


def as_arguments(options: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def run_all(jobs: list[Job], side_by_side: int, deadline: float) -> bool:
    """Do what is not done yet, several at a time. False where the time ran out."""
    waiting = [job for job in jobs if not job.done.exists()]
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
                    told = job.log.read_text()[-2000:]
                    sys.exit(f"failed: {' '.join(process.args)}\n{told}")
                print(f"{total - len(waiting) - len(running)} of {total}: {job.done}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--side-by-side", type=int, default=2)
    arguments = parser.parse_args()
    deadline = time.time() + 60 * arguments.minutes
    experiment = Experiment(arguments.dataset, arguments.out, arguments.seeds, arguments.epochs)
    print(experiment.timing(deadline))
    print(run_all(experiment.tuning(), arguments.side_by_side, deadline))


if __name__ == "__main__":
    main()

"""Compare cheaper ways of mining: their cost, and the resulting features.

    python benchmarks/mining.py train --minutes 9     # again and again, until it says done
    python benchmarks/mining.py speed                 # on an idle machine
    python benchmarks/mining.py report

`train` runs every way over the seeds on flowers and measures kNN and a linear probe on the test
split; what is done stays done. `speed` times the step of each beside MAE's. `report` writes the
table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import step
import torch
from methods import Job, as_arguments, gain, read_top1, run_all, spread
from results import machine, table, write_section

DATA = Path(__file__).parent / ".." / ".." / "shared" / "data" / "flowers"
EXACT = "exact (the paper)"
WAYS: dict[str, dict] = {
    "MAE (nothing mined)": {"mask": "random", "predictor_loss": "none"},
    EXACT: {},
    "teacher at half size": {"teacher_scale": 0.5},
    "every 4th step": {"mine_every": 4},
    "half size, one block": {"teacher_scale": 0.5, "predictor_depth": 1},
    "memory": {"mine_by": "memory"},
    "memory, no predictor": {"mine_by": "memory", "predictor_loss": "none"},
}
COMMON = {
    "model": "vit_nano",
    "image_size": 64,
    "patch_size": 8,
    "batch_size": 64,
    "holdout": 64,
    "base_lr": 8e-3,
    "target": "pixels",
    "eval_every": "100%",
    "log_every": 20,
    "checkpoint_every": "50%",
    "keep_checkpoints": 1,
    "workers": 0,
}
PROTOCOLS = {"knn": "kNN, k = 20", "linear": "linear probe"}
DIFFERENCES = ("minus exact, kNN", "minus exact, linear")
FEATURES = "trained, patch mean"
SIZES: dict[str, dict] = {
    "ViT-Ti, 64 px": step.as_options(step.SIZES["vit_tiny"]),
    "ViT-B, 224 px": step.as_options(step.SIZES["vit_base"]),
}
if torch.cuda.is_available():
    SIZES = {"ViT-B, 224 px": {"model": "vit_base", "batch_size": 256}}


class Experiment:
    """The runs and their results."""

    def __init__(self, out: Path, seeds: int, epochs: int):
        self.out, self.seeds, self.epochs = out, range(seeds), epochs

    def run(self, way: str, seed: int) -> Path:
        name = way.replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
        return self.out / f"{name}_seed_{seed}"

    def training(self, way: str, seed: int) -> Job:
        run = self.run(way, seed)
        options = COMMON | WAYS[way] | {"seed": seed, "epochs": self.epochs, "out": run}
        command = ("pretrain", str(DATA), *as_arguments(options))
        return Job(command, run, "backbone.safetensors", run.with_name(run.name + ".log"))

    def evaluation(self, protocol: str, way: str, seed: int) -> Job:
        run = self.run(way, seed)
        options = {"baselines": "false", "workers": 0, "seed": seed, "out": run / "evals"}
        command = ("eval", protocol, str(run), str(DATA), *as_arguments(options))
        return Job(command, run / "evals", f"{protocol}_*.json", run.with_name(run.name + ".log"))

    def train(self, side_by_side: int, deadline: float) -> bool:
        """Run all ways seed by seed, so that results can be compared at any time."""
        for seed in self.seeds:
            runs = [self.training(way, seed) for way in WAYS]
            evaluations = [self.evaluation(p, way, seed) for way in WAYS for p in PROTOCOLS]
            for jobs in (runs, evaluations):
                if not run_all(jobs, side_by_side, deadline):
                    return False
        return True

    def top1(self, protocol: str, way: str) -> list[float]:
        jobs = [self.evaluation(protocol, way, seed) for seed in self.seeds]
        return [read_top1(job, protocol, FEATURES) for job in jobs]

    def mining_accuracy(self, way: str) -> list[float]:
        """Of the teacher on held-out images, at the end."""
        found = []
        for seed in self.seeds:
            lines = (self.run(way, seed) / "metrics.jsonl").read_text().splitlines()
            last = {name: value for line in lines for name, value in json.loads(line).items()}
            found.append(100 * last.get("held_out/mining_accuracy", 0.0))
        return found

    def speed(self, repeats: int) -> None:
        """`hpm bench step` of every way and size, as JSON beside the runs."""
        self.out.mkdir(parents=True, exist_ok=True)
        for (size, options), (way, changes) in product(SIZES.items(), list(WAYS.items())[1:]):
            arguments = as_arguments(options | changes | {"repeats": repeats, "steps_each": 2})
            file = self.speed_file(size, way)
            print(f"{size}, {way}", flush=True)
            command = [sys.executable, "-m", "hpm", "bench", "step", *arguments, "--json"]
            subprocess.run([*command, str(file)], check=True, stdout=subprocess.DEVNULL)

    def speed_file(self, size: str, way: str) -> Path:
        name = f"{size} {way}".replace(" ", "_").replace(",", "")
        return self.out / f"speed_{name}.json"

    def ratio(self, size: str, way: str) -> str:
        """Cost of a step relative to MAE's, measured and by operation count."""
        file = self.speed_file(size, way)
        if not file.exists():
            return "1" if "MAE" in way else "not measured"
        found = json.loads(file.read_text())["hpm_to_mae"]
        span = f"{found['low']:.2f} to {found['high']:.2f}"
        return f"{found['median']:.2f} ({span}; by operations {found['operations']:.2f})"

    def report(self) -> None:
        """Write the section of RESULTS.md."""
        rows = []
        for way in WAYS:
            found = {protocol: self.top1(protocol, way) for protocol in PROTOCOLS}
            gains = [
                "" if way == EXACT else gain(found[protocol], self.top1(protocol, EXACT))
                for protocol in PROTOCOLS
            ]
            has_predictor = WAYS[way].get("predictor_loss") != "none"
            accuracy = spread(self.mining_accuracy(way)) if has_predictor else "–"
            rows.append([way, *[spread(v) for v in found.values()], *gains, accuracy])
        speeds = [[way, *[self.ratio(size, way) for size in SIZES]] for way in WAYS]
        options = " ".join(as_arguments(COMMON | {"epochs": self.epochs}))
        text = f"""
## Cheaper mining

`python benchmarks/mining.py train --seeds {len(self.seeds)} --epochs {self.epochs}`, then `speed`
and `report`, on {machine()}. Each run is `hpm pretrain flowers {options}` and the options of its
row (`WAYS` in the script).

Top-1 in % on the test split, mean of the patches, mean ± standard deviation over
{len(self.seeds)} seeds; differences from exact mining seed by seed, in points; how often the
teacher orders two patches of a held-out image right at the end, in %.

{table(["", *PROTOCOLS.values(), *DIFFERENCES, "teacher's order"], rows)}

Time of a training step as a multiple of MAE's, taken in turns (`hpm bench step`; median, lowest to
highest):

{table(["", *SIZES], speeds)}
"""
        write_section("mining", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["train", "speed", "report"])
    parser.add_argument("--minutes", type=float, default=9, help="of this piece of training")
    parser.add_argument("--out", type=Path, default=Path("runs/mining"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each timing")
    chosen = parser.parse_args()
    experiment = Experiment(chosen.out, chosen.seeds, chosen.epochs)
    if chosen.job == "train":
        done = experiment.train(chosen.side_by_side, time.time() + 60 * chosen.minutes)
        print("done" if done else "time is up: run the same command again to resume")
    elif chosen.job == "speed":
        experiment.speed(chosen.repeats)
    else:
        experiment.report()


if __name__ == "__main__":
    main()

"""Find the best base learning rate of short runs: kNN accuracy over steps and learning rates.

    python benchmarks/learning_rate.py train --out runs/learning_rate   # goes on where it stopped
    python benchmarks/learning_rate.py report --out runs/learning_rate

`report` writes the section of RESULTS.md from the runs that are finished.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from methods import as_arguments
from results import machine, spread, table, write_section

DATA = Path(__file__).parent / ".." / ".." / "shared" / "data" / "flowers"
STEPS = (100, 300, 1000)
BASE_LRS = (1.5e-4, 5e-4, 1.5e-3, 4e-3, 8e-3)
COMMON: dict[str, Any] = {
    "model": "vit_nano",
    "image_size": 64,
    "patch_size": 8,
    "batch_size": 64,
    "holdout": 64,
    "eval_every": "100%",
    "checkpoint_every": "100%",
    "keep_checkpoints": 1,
    "workers": 0,
}
K = 20


def run_folder(out: Path, steps: int, base_lr: float, seed: int) -> Path:
    return out / f"steps_{steps}_lr_{base_lr:g}_seed_{seed}"


def train(out: Path, steps: list[int], base_lrs: list[float], seeds: int) -> None:
    """Train all runs that are not finished, shortest first."""
    import hpm

    for seed, count, base_lr in product(range(seeds), steps, base_lrs):
        folder = run_folder(out, count, base_lr, seed)
        if top1(folder, "trained") is not None:
            continue
        own: dict[str, Any] = {"steps": count, "base_lr": base_lr, "seed": seed}
        hpm.pretrain(data=str(DATA), out=str(folder), **COMMON, **own)
        # Random weights are the same for all runs of a seed.
        baselines = (count, base_lr) == (STEPS[0], BASE_LRS[0])
        hpm.evaluate("knn", str(folder), str(DATA), k=(K,), baselines=baselines, workers=0)


def top1(folder: Path, weights: str) -> float | None:
    """kNN top-1 in %; None if it is not measured yet."""
    for file in folder.glob("evals/knn_*.json"):
        values = json.loads(file.read_text())["values"].get(f"{weights}, patch mean")
        return values[f"k = {K}"]["top1"] if values else None
    return None


def report(out: Path, seeds: int) -> None:
    """Write the section of RESULTS.md."""

    def found(count: int, base_lr: float, weights: str = "trained") -> list[float]:
        values = [top1(run_folder(out, count, base_lr, seed), weights) for seed in range(seeds)]
        return [value for value in values if value is not None]

    rows = [[str(count), *[spread(found(count, lr)) for lr in BASE_LRS]] for count in STEPS]
    random = spread(found(STEPS[0], BASE_LRS[0], "random weights"))
    text = f"""
## Base learning rate of short runs, flowers

`python benchmarks/learning_rate.py train`, then `report`, on {machine()}. Each run is
`hpm pretrain flowers {" ".join(as_arguments(COMMON))}` with the steps of its row and the
`--base-lr` of its column; the peak learning rate is a quarter of it (64 / 256).

Top-1 in % by kNN (k = {K}) on the test split, mean of the patches: mean ± standard deviation of
{seeds} seeds, one seed where there is no ±; – was not run. Random weights: {random}.

{table(["steps", *[f"{lr:g}" for lr in BASE_LRS]], rows)}
"""
    write_section("learning rate", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["train", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rate"))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--base-lrs", type=float, nargs="+", default=BASE_LRS, choices=BASE_LRS)
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.job == "train":
        train(chosen.out, chosen.steps, chosen.base_lrs, chosen.seeds)
    else:
        report(chosen.out, chosen.seeds)


if __name__ == "__main__":
    main()

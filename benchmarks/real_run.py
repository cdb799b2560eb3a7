"""Compare a training with its benchmark: `python benchmarks/real_run.py BENCHMARK.json RUN.json`.

`hpm bench step` times the training step on noise. A run also loads images, logs, evaluates and
saves. This script trains with the options of the benchmark, and prints the images per second of
both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import hpm
from hpm.commands.bench_step import HARD_SHARE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path, help="written by hpm bench step --json")
    parser.add_argument("report", type=Path, help="JSON to write")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--holdout", type=int, default=128)
    parser.add_argument("--workers", type=int, default=None)
    chosen = parser.parse_args()
    benchmark = json.loads(chosen.benchmark.read_text())
    with tempfile.TemporaryDirectory() as folder:
        options = run_options(benchmark, chosen.steps)
        run = hpm.pretrain(
            chosen.data,
            out=f"{folder}/run",
            holdout=chosen.holdout,
            workers=chosen.workers,
            **options,
        )
        report = speeds(run.metrics(), chosen.steps) | {"held_out": chosen.holdout}
    chosen.report.write_text(json.dumps(report | {"options": options}, indent=2) + "\n")
    step = benchmark["methods"]["HPM"]["images_per_second"]
    print(
        f"real run {report['images_per_second']:.1f} images/s, benchmark {step:.1f} images/s: "
        f"{100 * report['images_per_second'] / step:.0f} %; "
        f"{100 * report['data_wait']:.0f} % of the time waiting for images"
    )


def run_options(benchmark: dict[str, Any], steps: int) -> dict[str, Any]:
    """The benchmark's training: the same sizes, and as many patches mined at every step."""
    architecture = benchmark["architecture"]
    return {
        "model": benchmark["model"],
        "image_size": tuple(architecture["image_size"]),
        "patch_size": tuple(architecture["patch_size"]),
        "channels": architecture["channels"],
        "batch_size": benchmark["batch_size"],
        "precision": benchmark["precision"],
        "compile": "true" if benchmark["compiled"] else "false",
        "hard_share_start": HARD_SHARE,
        "hard_share_end": HARD_SHARE,
        "steps": steps,
        "log_every": max(1, steps // 20),
        "eval_every": "50%",
        "checkpoint_every": "50%",
    }


def speeds(metrics: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Medians over the readings of the second half: the first ones compile and fill the cache."""
    late = [line for line in metrics if "images_per_second" in line and line["step"] > steps / 2]
    return {
        "steps": steps,
        "images_per_second": statistics.median(line["images_per_second"] for line in late),
        "data_wait": statistics.median(line["data_wait"] for line in late),
    }


if __name__ == "__main__":
    main()

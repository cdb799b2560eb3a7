"""How time and memory of a training step grow with image size, batch and model; with a plot.

    python benchmarks/growth.py       # on an idle machine; a GPU is used where there is one

Every point is measured in a separate process, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import machine, table, write_section

from hpm.commands.bench_step import HARD_SHARE, build_bench_run, noise_batch
from hpm.commands.multiply_adds import step_multiply_adds
from hpm.commands.options import BenchConfig
from hpm.core.distributed import pick_device
from hpm.pretraining import train_step
from hpm.training.log import memory_gb

FOLDER = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
MODEL, BATCH = ("vit_base", 32) if ON_GPU else ("vit_tiny", 4)
SERIES: dict[str, list[dict]] = {
    "image size": [{"image_size": size} for size in (96, 128, 192, 256, 320, 448)],
    "batch": [{"batch_size": BATCH * n, "image_size": 128} for n in (1, 2, 4, 8, 16)],
    "model": [
        {"model": model, "image_size": 128}
        for model in ("vit_nano", "vit_tiny", "vit_small", "vit_base")
        + (("vit_large", "vit_huge") if ON_GPU else ())
    ],
}


def measure(options: dict) -> dict:
    """Median seconds of a step; increase of peak memory by model and step, in GB."""
    device = pick_device("auto")
    sizes = {"model": MODEL, "batch_size": BATCH, "patch_size": 16} | options
    config = BenchConfig(**sizes, compile="false")
    before = memory_gb(device)
    with tempfile.TemporaryDirectory() as folder:
        state = build_bench_run(config, {}, Path(folder) / "run", device)
        batch, num_hard = noise_batch(state), int(state.num_hidden * HARD_SHARE)
        seconds = []
        for number in range(5):
            start = time.perf_counter()
            train_step(state, batch, 0, num_hard)
            if ON_GPU:
                torch.cuda.synchronize()
            if number > 1:
                seconds.append(time.perf_counter() - start)
        state.log.close()
    architecture = state.architecture
    patches = state.model.encoder.num_patches
    total = step_multiply_adds(architecture, state.config) * state.config.global_batch_size
    return {
        "seconds": statistics.median(seconds),
        "memory_gb": memory_gb(device) - before,
        "patches": patches,
        "multiply_adds": total,
        "parameters": sum(p.numel() for p in state.model.parameters()),
    }


def slope(xs: list[float], ys: list[float]) -> float:
    """Exponent of the growth between the last two points."""
    return math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])


def draw(found: dict[str, list[dict]], file: Path) -> None:
    """Time and memory over each series, on doubly logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    axes_of = {
        "image size": "patches of an image",
        "batch": "images of a batch",
        "model": "parameters, M",
    }
    figure, panels = pyplot.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for column, (name, points) in enumerate(found.items()):
        xs = [x_of(name, point) for point in points]
        for row, (key, title) in enumerate((("seconds", "seconds"), ("memory_gb", "GB"))):
            panel, ys = panels[row][column], [point[key] for point in points]
            panel.loglog(xs, ys, "o-", color="#4477aa")
            # What exactly proportional and squared growth from the first point would be.
            for power, style in ((1, ":"), (2, "--")):
                line = [ys[0] * (x / xs[0]) ** power for x in xs]
                panel.loglog(
                    xs,
                    line,
                    style,
                    color="#bbbbbb",
                    zorder=0,
                    label="proportional" if power == 1 else "squared",
                )
            panel.set_ylim(min(ys) / 1.6, max(ys) * 2.5)
            panel.set_xticks(xs, [f"{x:g}" for x in xs])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylabel(f"{'time of a step' if row == 0 else 'peak memory'}, {title}")
            panel.spines[["top", "right"]].set_visible(False)
        panels[1][column].set_xlabel(axes_of[name])
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def x_of(name: str, point: dict) -> float:
    if name == "image size":
        return point["patches"]
    if name == "batch":
        return point["options"]["batch_size"]
    return round(point["parameters"] / 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure one point and print it, for this script itself")
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(json.loads(chosen.one))))
        return
    found: dict[str, list[dict]] = {}
    for name, series in SERIES.items():
        found[name] = []
        for options in series:
            command = [sys.executable, __file__, "--one", json.dumps(options)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]) | {"options": options})
            print(name, found[name][-1], flush=True)
    file = FOLDER / "growth.png"
    draw(found, file)
    sections = []
    for name, points in found.items():
        rows = [
            [
                ", ".join(f"{k} {v}" for k, v in p["options"].items()),
                str(p["patches"]),
                f"{p['multiply_adds'] / 1e9:.1f}",
                f"{p['seconds']:.3f}",
                f"{p['memory_gb']:.3f}",
            ]
            for p in points
        ]
        xs = [x_of(name, p) for p in points]
        sections.append(
            table([name, "patches", "multiply-adds, G", "step, s", "memory, GB"], rows)
            + "\n\nExponents from the last point but one to the last: time "
            f"{slope(xs, [p['seconds'] for p in points]):.2f}, memory "
            f"{slope(xs, [p['memory_gb'] for p in points]):.2f}."
        )
    write_section(
        "growth",
        f"## Growth\n\n`python benchmarks/growth.py` on {machine()}: one step of HPM; where "
        f"nothing else is said, {MODEL}, batch {BATCH}, patches of 16. Memory is the peak beyond "
        f"what the process held before the model.\n\n"
        + "\n\n".join(sections)
        + f"\n\n![growth of time and memory]({file.name})",
    )


if __name__ == "__main__":
    main()

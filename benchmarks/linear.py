"""What the linear layer's kernel on a CPU is worth: one HPM step with it and without, in turns.

python benchmarks/linear.py       # on an idle machine without a GPU
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results import machine, table, write_section

from hpm.bench import HARD_SHARE, noise_batch, run_state
from hpm.config import BenchConfig
from hpm.models import linear
from hpm.pretrain import train_step

SIZES = {
    "vit_tiny, 64 px, batch 64": {
        "model": "vit_tiny", "image_size": 64, "patch_size": 8, "batch_size": 64,
    },
    "vit_base, 224 px, batch 8": {"model": "vit_base", "batch_size": 8},
}  # fmt: skip


def ratios(options: dict, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """(seconds with, seconds without, ratio) of each round."""
    kernel, device = linear.ONEDNN, torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        state = run_state(BenchConfig(**options, compile="false"), {}, Path(folder) / "run", device)
        batch, num_hard = noise_batch(state), int(state.num_hidden * HARD_SHARE)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds + 1):
            for fast in (True, False):
                linear.ONEDNN = kernel if fast else None
                start = time.perf_counter()
                train_step(state, batch, 0, num_hard)
                if number:  # the first warms up
                    seconds[fast].append(time.perf_counter() - start)
        linear.ONEDNN = kernel
        state.log.close()
    ours, plain = seconds[True], seconds[False]
    return ours, plain, [p / o for o, p in zip(ours, plain, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    chosen = parser.parse_args()
    rows = []
    for name, options in SIZES.items():
        ours, plain, ratio = ratios(options, chosen.rounds)
        rows.append([
            name, f"{statistics.median(plain):.2f}", f"{statistics.median(ours):.2f}",
            f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["", "PyTorch's, s", "oneDNN's, s", "times as fast"]
    write_section(
        "linear",
        f"## The linear layer's kernel on a CPU\n\n`python benchmarks/linear.py` on {machine()}: "
        f"one step of HPM with either kernel, {chosen.rounds} rounds in turns; medians.\n\n"
        f"{table(head, rows)}",
    )


if __name__ == "__main__":
    main()

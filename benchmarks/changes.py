"""Measure the gain of each optimisation of the training step: HPM's step with and without it.

python benchmarks/changes.py vit_tiny     # or vit_base; on an idle machine
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import machine, table, write_section
from step import SIZES, as_options
from torch import Tensor

from hpm import pretraining
from hpm.commands.bench_step import HARD_SHARE, build_bench_run, noise_batch
from hpm.commands.options import BenchConfig
from hpm.core.distributed import pick_device
from hpm.mining import miner
from hpm.mining.draw import Draw
from hpm.mining.masking import make_mask
from hpm.models import linear
from hpm.models.mim import Decoder
from hpm.training.run import PretrainingRun

Undo = Callable[[PretrainingRun], Any]  # a context without the optimisation


def every_output(self: Decoder, tokens: Tensor, num_outputs: int) -> Tensor:
    """Run the last block and the head on all tokens, and drop unused outputs."""
    for block in self.blocks:
        tokens = block(tokens)
    return self.head(self.norm(tokens))[:, -num_outputs:]


@contextmanager
def parameter_by_parameter(state: PretrainingRun) -> Iterator[None]:
    """Update the teacher one parameter at a time."""

    @torch.no_grad()
    def update(student: torch.nn.Module, decay: float) -> None:
        pairs = zip(state.teacher.model.parameters(), student.parameters(), strict=True)
        for ours, theirs in pairs:
            ours.mul_(decay).add_(theirs, alpha=1 - decay)

    with patch.object(state.teacher, "update", update):
        yield


@contextmanager
def loop_of_adamw(state: PretrainingRun) -> Iterator[None]:
    """Run the optimiser one parameter at a time."""
    group = state.optimizer.param_groups
    before = [(g["fused"], g["foreach"]) for g in group]
    for g in group:
        g["fused"], g["foreach"] = False, False
    try:
        yield
    finally:
        for g, (fused, foreach) in zip(group, before, strict=True):
            g["fused"], g["foreach"] = fused, foreach


def image_by_image(
    mask: Any, draw: Draw, grid: Any, num_hidden: int, signal: Tensor | None, *rest: Any
) -> Any:
    """Make masks in a loop over the images, as the published code does."""
    masks = [
        make_mask(
            mask,
            Draw(draw.seed, draw.epoch, draw.sample_ids[i : i + 1]),
            grid,
            num_hidden,
            None if signal is None else signal[i : i + 1],
            *rest,
        )
        for i in range(len(draw.sample_ids))
    ]
    return tuple(torch.cat(ids) for ids in zip(*masks, strict=True))


CHANGES: dict[str, Undo] = {
    "linear layers by oneDNN (CPU)": lambda state: patch.object(linear, "ONEDNN", None),
    "the last block's outputs alone": lambda state: patch.object(Decoder, "forward", every_output),
    "AdamW in one pass": loop_of_adamw,
    "the teacher's average in one pass": parameter_by_parameter,
    "masks of the whole batch at once": lambda state: patch.object(
        miner, "make_mask", image_by_image
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=6)
    chosen = parser.parse_args()
    options = as_options(SIZES[chosen.size])
    device = pick_device("auto")
    names = [n for n in CHANGES if device.type == "cpu" or "CPU" not in n]
    seconds: dict[str, list[float]] = {name: [] for name in ["now", *names]}
    with tempfile.TemporaryDirectory() as folder:
        state = build_bench_run(
            BenchConfig(**options, compile="false"), {}, Path(folder) / "run", device
        )
        batch, num_hard = noise_batch(state), int(state.num_hidden * HARD_SHARE)

        def step() -> float:
            start = time.perf_counter()
            pretraining.train_step(state, batch, 0, num_hard)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        for number in range(chosen.rounds + 1):
            for name in seconds:
                with nullcontext() if name == "now" else CHANGES[name](state):
                    taken = step()
                if number:  # the first round warms up
                    seconds[name].append(taken)
        state.log.close()
    now = seconds.pop("now")
    rows = [["as it is", f"{1e3 * statistics.median(now):.1f}", "1"]]
    for name, before in seconds.items():
        ratios = [b / a for a, b in zip(now, before, strict=True)]
        rows.append(
            [
                f"without: {name}",
                f"{1e3 * statistics.median(before):.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        )
    results = table(["", "ms", "times as long"], rows)
    write_section(
        f"changes {chosen.size}",
        f"## Before and after, {chosen.size}\n\n`python benchmarks/changes.py {chosen.size} "
        f"--rounds {chosen.rounds}` on {machine()}: one step of HPM "
        f"({' '.join(SIZES[chosen.size])}), eager, in turns; medians, and the time without a "
        f"change as a multiple of the time with it (lowest to highest).\n\n{results}",
    )


if __name__ == "__main__":
    main()

"""Draw the time of one training step by phase and kind of operator.

python benchmarks/profile_step.py vit_tiny      # or vit_base; a GPU is used where there is one
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from results import machine, table, write_section
from step import SIZES, as_options
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hpm.commands.bench_step import PHASES, build_bench_run, noise_batch
from hpm.commands.options import BenchConfig
from hpm.core.distributed import pick_device
from hpm.core.phases import PhaseClock
from hpm.pretraining import train_step

FOLDER = Path(__file__).parent
# The first whose words are part of the operator's name.
KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": ("mm", "linear", "gemm", "cutlass", "nvjet"),
    "attention": ("attention", "flash", "fmha"),
    "GELU": ("gelu",),
    "norms": ("layer_norm", "layernorm"),
    "optimiser": ("adam", "foreach", "lerp", "norm", "multi_tensor"),
    "gather, copy": ("gather", "scatter", "index", "cat", "copy", "clone", "sort", "topk"),
}
OTHER = "other"
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")


def kind_of(name: str) -> str:
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), OTHER)


def phases_of_step(step: Callable[[], object], on_gpu: bool) -> dict:
    """Milliseconds by phase and kind: each operator counts for the phase that it ran in."""
    found: dict[str, dict[str, float]] = {p: defaultdict(float) for p in PHASES}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    # The clock waits for the device at the end of each phase, so that the spans do not overlap.
    device = torch.device("cuda" if on_gpu else "cpu")
    with profile(activities=activities) as recorded, PhaseClock(device):
        step()
    # An operator's time on a GPU is that of its kernels, which are events as well.
    events = [event for event in recorded.events() if event.device_type == DeviceType.CPU]
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in events if e.name in PHASES]
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.name in PHASES or not own:
            continue
        middle = (event.time_range.start + event.time_range.end) / 2
        # The backward pass runs in another thread: assign operators to phases by time.
        phase = next((p for start, end, p in spans if start <= middle <= end), None)
        if phase is not None:
            found[phase][kind_of(event.name)] += own / 1e3
    return found


def draw(found: dict, title: str, file: Path) -> None:
    """Draw a bar per phase, divided into kinds of operators."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [*KINDS, OTHER]
    figure, axis = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    for row, phase in enumerate(PHASES):
        left = 0.0
        for kind, colour in zip(kinds, COLOURS, strict=True):
            width = found[phase][kind]
            label = kind if row == 0 else None
            axis.barh(row, width, left=left, color=colour, label=label, edgecolor="white")
            left += width
        axis.text(left, row, f" {left:.1f} ms", va="center", fontsize=9)
    axis.set_yticks(range(len(PHASES)), PHASES)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    axis.margins(x=0.12)
    axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    chosen = parser.parse_args()
    words = SIZES[chosen.size]
    options = as_options(words)
    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        config = BenchConfig(**options, compile="false")
        run = build_bench_run(config, {}, Path(folder) / "run", device)
        batch, num_hard = noise_batch(run), run.num_hidden // 4
        for _ in range(2):
            train_step(run, batch, 0, num_hard)
        found = phases_of_step(lambda: train_step(run, batch, 0, num_hard), on_gpu)
        run.log.close()
    file = FOLDER / f"profile_{chosen.size}.png"
    draw(found, f"One step of Hard Patches Mining, {' '.join(words)}", file)
    total = sum(sum(kinds.values()) for kinds in found.values())
    kinds = [*KINDS, OTHER]
    rows = [
        [phase, *[f"{found[phase][k]:.1f}" for k in kinds], f"{sum(found[phase].values()):.1f}"]
        for phase in PHASES
    ]
    sums = [sum(found[p][k] for p in PHASES) for k in kinds]
    rows.append(["share of the step, %", *[f"{100 * s / total:.1f}" for s in sums], "100"])
    write_section(
        f"profile {chosen.size}",
        f"## One step, operator by operator, {chosen.size}\n\n"
        f"`python benchmarks/profile_step.py {chosen.size}` on {machine()}; milliseconds, eager, "
        f"with the profiler's own cost.\n\n{table(['', *kinds, 'all'], rows)}\n\n"
        f"![profile of one step]({file.name})",
    )


if __name__ == "__main__":
    main()

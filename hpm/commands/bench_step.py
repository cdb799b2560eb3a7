"""`hpm bench step`: time of a training step and its phases, compared with the hardware's peak."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hpm.commands.multiply_adds import step_multiply_adds
from hpm.commands.options import BenchConfig
from hpm.commands.timing import (
    about_device,
    machine,
    matrix_product_flops,
    print_table,
    speed,
    speed_rows,
    wait,
)
from hpm.core.choices import HARD_SHARES
from hpm.core.config import PretrainConfig
from hpm.core.distributed import pick_device
from hpm.core.errors import UserError
from hpm.core.phases import PhaseClock
from hpm.core.progress import track
from hpm.data.loader import Batch
from hpm.pretraining import train_step
from hpm.training.build import build_run
from hpm.training.checks import check_pretrain
from hpm.training.compiling import compiles
from hpm.training.log import memory_gb
from hpm.training.run import PretrainingRun

PHASES = ("teacher", "mining", "forward", "backward", "optimiser", "EMA")
METHODS: dict[str, dict[str, Any]] = {
    "MAE": {
        "mask": "random",
        "predictor_loss": "none",
        "teacher_scale": 1.0,
        "mining_temperature": 0.0,
        "mine_tubes": "none",
    },
    "HPM": {},
}
# Options of a run that neither loads, evaluates nor keeps anything.
STEP_ONLY: dict[str, Any] = {
    "holdout": 0,
    "epochs": 1000,
    "init": None,
    "init_partial": False,
    "init_teacher": False,
    "pretrained": False,
    "freeze_encoder": None,
    "probe": None,
    "normalize": "measured",  # which fits any channels; see `build_bench_run`
    "stream": False,
    "cache": "false",
    "tracker": "none",
}
HARD_SHARE = 0.25  # the value half-way through training, so that the teacher runs


@dataclass
class Measured:
    """Timings of a method: seconds of each step, and seconds of each phase, measured separately."""

    name: str
    multiply_adds: float  # per image and step
    batch_size: int
    steps: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    memory_gb: float = 0.0


def bench_step(config: BenchConfig) -> dict[str, Any]:
    """Time the training step of MAE and HPM in turns. Raises UserError on bad input."""
    if config.repeats < 1 or config.steps_each < 1:
        raise UserError("repeats and steps_each must be at least 1")
    for options in METHODS.values():
        check_pretrain(_run_config(config, options, Path("unused")))
    device = pick_device(config.device)
    memory = _peak_memory(config, device)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: build_bench_run(config, options, Path(folder) / name, device)
            for name, options in METHODS.items()
        }
        measured = {
            name: Measured(
                name,
                step_multiply_adds(run.architecture, run.config),
                run.config.global_batch_size,
                memory_gb=memory[name],
            )
            for name, run in runs.items()
        }
        products = []
        for run in runs.values():
            _warm_up(run)
        for _ in track(range(config.repeats), "rounds"):
            for name, run in runs.items():
                _time_steps(run, measured[name], config.steps_each)
            products.append(matrix_product_flops(device))
        for run in runs.values():
            run.log.close()
    return _report(config, measured, statistics.median(products), device, runs["HPM"])


def build_bench_run(
    config: BenchConfig, options: dict[str, Any], out: Path, device: torch.device
) -> PretrainingRun:
    """Build a run without loading images, and without announcing it."""
    half = [0.5] * config.channels  # mean and standard deviation; a step takes equally long
    return build_run(_run_config(config, options, out), device, quiet=True, statistics=(half, half))


def _run_config(config: BenchConfig, options: dict[str, Any], out: Path) -> PretrainConfig:
    names = [field.name for field in dataclasses.fields(PretrainConfig)]
    given = {name: getattr(config, name) for name in names}
    data = "demo" if config.frames == 1 else "demo-video"
    given |= STEP_ONLY | {"data": data, "out": str(out)}
    return PretrainConfig(**given | options)


def _peak_memory(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Peak memory of each method in GB, measured in a separate process."""
    start_method = multiprocessing.get_context("spawn")
    found = {}
    for name, options in METHODS.items():
        with ProcessPoolExecutor(1, start_method) as process:
            found[name] = process.submit(_memory_of, config, options, device).result()
    return found


def _memory_of(config: BenchConfig, options: dict[str, Any], device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = build_bench_run(config, options, Path(folder) / "run", device)
        _warm_up(run)
        run.log.close()
    return memory_gb(device)


def _warm_up(run: PretrainingRun) -> None:
    """Compile, fill caches and allocate memory."""
    batch = noise_batch(run)
    for _ in range(3 if run.device.type == "cuda" else 1):
        _run_turn(run, batch)
    wait(run.device)


def _time_steps(run: PretrainingRun, measured: Measured, count: int) -> None:
    """Time whole steps, then the phases of one turn. A first turn is not timed, because the caches
    still hold the other method's data."""
    device, turn = run.device, run.config.mine_every
    batch = noise_batch(run)
    _run_turn(run, batch)
    wait(device)
    for _ in range(count):
        start = time.perf_counter()
        _run_turn(run, batch)
        wait(device)
        measured.steps.append((time.perf_counter() - start) / turn)
    with PhaseClock(device) as clock:
        _run_turn(run, batch)
    for phase in PHASES:
        measured.phases[phase].append(clock.seconds.get(phase, 0.0) / turn)


def _run_turn(run: PretrainingRun, batch: Batch) -> None:
    """Run `mine_every` steps, of which the teacher predicts losses in the first."""
    config = run.config
    num_hard = int(run.num_hidden * HARD_SHARE) if config.mask in HARD_SHARES else 0
    for step in range(config.mine_every):
        train_step(run, batch, step, num_hard)


def noise_batch(run: PretrainingRun) -> Batch:
    """A batch of images or clips of noise."""
    config = run.config
    size = (config.global_batch_size, config.channels, *run.architecture.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    whole = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat(len(images), 1)
    times = whole[:, :2] if config.frames > 1 else None
    batch = Batch(images, torch.arange(len(images)), [], whole, times=times)
    return batch.pin_memory() if run.device.type == "cuda" else batch


def _report(
    config: BenchConfig,
    measured: dict[str, Measured],
    product: float,
    device: torch.device,
    run: PretrainingRun,
) -> dict[str, Any]:
    """Collect all numbers."""
    about = about_device(device, product)
    methods = {
        name: {
            **speed(found.steps, found.batch_size, found.multiply_adds, about),
            "phases_ms": {p: 1e3 * statistics.median(s) for p, s in found.phases.items()},
            "memory_gb": found.memory_gb,
        }
        for name, found in measured.items()
    }
    ratios = [h / m for h, m in zip(measured["HPM"].steps, measured["MAE"].steps, strict=True)]
    return {
        **about,
        "precision": run.config.precision,
        "model": config.model,
        "architecture": run.architecture.to_json(),
        "batch_size": run.config.batch_size,
        "compiled": compiles(run.config, device),
        "methods": methods,
        "hpm_to_mae": {
            "median": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "operations": measured["HPM"].multiply_adds / measured["MAE"].multiply_adds,
        },
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the numbers as a table."""
    size = report["architecture"]["image_size"]
    console.print(
        f"{report['model']}, {' x '.join(map(str, size))} px, batch {report['batch_size']}, "
        f"{report['precision']}, {'compiled' if report['compiled'] else 'eager'}, on "
        f"{machine(report)}",
        highlight=False,
        soft_wrap=True,
    )
    found = list(report["methods"].values())
    rate, step, *shares = speed_rows(found, report["peak_tflops"])
    phases = [[f"  {p}, ms", *[f"{m['phases_ms'][p]:.2f}" for m in found]] for p in PHASES]
    memory = ["peak memory, GB", *[f"{m['memory_gb']:.2f}" for m in found]]
    print_table(console, list(report["methods"]), (rate, step, *phases, memory, *shares))
    ratio = report["hpm_to_mae"]
    console.print(
        f"HPM takes {ratio['median']:.2f} times as long as MAE ({ratio['low']:.2f} to "
        f"{ratio['high']:.2f}); by operation count {ratio['operations']:.2f}",
        highlight=False,
    )

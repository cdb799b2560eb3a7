"""What timings need: waiting for the device, its speed in a matrix product, tables of results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpm.core.phases import PhaseClock
from hpm.core.precision import auto_precision

# Peak TFLOP/s of dense bfloat16 products, according to the vendor.
PEAKS = {"H100": 990.0, "H200": 990.0, "A100": 312.0}
FULL_SIZE, CPU_SIZE = 8192, 2048  # sides of the square matrices of the reference product


def wait(device: torch.device) -> None:
    """Until the device has done all its work."""
    PhaseClock(device).now()


def matrix_product_flops(device: torch.device) -> float:
    """FLOP/s of a square matrix product, in the precision of `auto`."""
    size = FULL_SIZE if device.type == "cuda" else CPU_SIZE
    kind = getattr(torch, auto_precision(device))
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    a @ b
    wait(device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def about_device(device: torch.device, product: float) -> dict[str, Any]:
    """The machine, for a report. product: FLOP/s of its matrix product."""
    kinds = {"cpu": "CPU", "mps": "Apple GPU"}
    chip = kinds.get(device.type) or torch.cuda.get_device_name(device)
    return {
        "device": chip,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrix_product_tflops": product / 1e12,
        "peak_tflops": next((value for name, value in PEAKS.items() if name in chip), None),
    }


def speed(
    seconds: list[float], batch_size: int, multiply_adds: float, device: dict[str, Any]
) -> dict[str, Any]:
    """Numbers of the steps that took so many seconds each, of which the median counts.

    multiply_adds: per image. device: from `about_device`.
    """
    per_second = batch_size / statistics.median(seconds)
    tflops = 2 * multiply_adds * per_second / 1e12  # two operations for each multiply-add
    peak = device["peak_tflops"]
    return {
        "images_per_second": per_second,
        "step_ms": 1e3 * statistics.median(seconds),
        "step_ms_spread": 1e3 * (statistics.stdev(seconds) if len(seconds) > 1 else 0.0),
        "multiply_adds_per_image": multiply_adds,
        "tflops": tflops,
        "share_of_matrix_product": tflops / device["matrix_product_tflops"],
        "share_of_peak": tflops / peak if peak else None,
    }


def machine(report: dict[str, Any]) -> str:
    """A line about the machine of a report that holds `about_device`."""
    return (
        f"{report['device']} ({report['threads']} threads), torch {report['torch']}; a matrix "
        f"product reaches {report['matrix_product_tflops']:.3g} TFLOP/s"
    )


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of a title and a number for each of the columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def speed_rows(columns: list[dict[str, Any]], peak_tflops: float | None) -> list[list[str]]:
    """Title and cells of each row of a table, from numbers of `speed`, one for each column."""
    rows = [
        ["images per second", *[f"{m['images_per_second']:.1f}" for m in columns]],
        ["step, ms", *[f"{m['step_ms']:.1f} ± {m['step_ms_spread']:.1f}" for m in columns]],
        [
            "multiply-adds per image, G",
            *[f"{m['multiply_adds_per_image'] / 1e9:.3g}" for m in columns],
        ],
        [
            "of the matrix product, %",
            *[f"{100 * m['share_of_matrix_product']:.0f}" for m in columns],
        ],
    ]
    if peak_tflops:
        shares = [f"{100 * m['share_of_peak']:.1f}" for m in columns]
        rows.append([f"of {peak_tflops:.0f} TFLOP/s, %", *shares])
    return rows

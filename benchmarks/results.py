"""Write RESULTS.md, in which each script has a section between its own markers."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

All measurements, with the commands that made them. A script has written each section; no number was
entered by hand.
"""


def write_section(name: str, text: str, file: Path = RESULTS) -> None:
    """Replace the section of that name by `text` (Markdown), or append it."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    whole = file.read_text(encoding="utf-8") if file.exists() else HEAD
    section = f"{begin}\n{text.strip()}\n{end}\n"
    if begin in whole:
        before, rest = whole.split(begin, 1)
        whole = before + section + "\n" + rest.split(end, 1)[1].lstrip("\n")
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    file.write_text(whole, encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def mean_and_half(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % t-interval, of at least two differences."""
    from scipy.stats import t

    mean, count = statistics.mean(differences), len(differences)
    return mean, float(t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5)


def interval(differences: list[float]) -> str:
    """Mean ± half of the 95 % t-interval."""
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else ""
    mean, half = mean_and_half(differences)
    return f"{mean:+.1f} ± {half:.1f}"


def machine() -> str:
    """A description of this machine."""
    if torch.cuda.is_available():
        chip = f"one of {torch.cuda.device_count()} {torch.cuda.get_device_name(0)}"
    else:
        chip = f"{os.cpu_count()} CPU cores ({_cpu_name()}), no GPU"
    return f"{chip}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

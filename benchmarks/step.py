"""Time the training step of MAE and HPM in turns: `python benchmarks/step.py vit_tiny`."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import machine, write_section
from rich.console import Console

from hpm.commands.bench_step import print_report

SIZES = {
    "vit_tiny": [
        "--model",
        "vit_tiny",
        "--image-size",
        "64",
        "--patch-size",
        "8",
        "--batch-size",
        "64",
    ],
    "vit_base": ["--model", "vit_base", "--batch-size", "8"],
}


def as_options(words: list[str]) -> dict[str, Any]:
    """`--image-size 64` -> image_size=64."""
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    values = [int(word) if word.isdigit() else word for word in words[1::2]]
    return dict(zip(names, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    options = [*SIZES[chosen.size], "--repeats", str(chosen.repeats), "--steps-each", "2"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "hpm", "bench", "step", *options, "--json", str(file)]
        subprocess.run(command, check=True)
        report = json.loads(file.read_text())
    text = io.StringIO()
    print_report(report, Console(file=text, width=100))
    write_section(
        f"step {chosen.size}",
        f"## The training step, {chosen.size}\n\n`hpm bench step {' '.join(options)}` on "
        f"{machine()}.\n\n```\n{text.getvalue().rstrip()}\n```",
    )


if __name__ == "__main__":
    main()

"""Time UPerNet and Mask R-CNN, in training and testing: `python benchmarks/dense.py`.

On a CPU the images are small; `--published` takes the sizes of the presets, for a GPU.
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import torch
from results import machine, write_section
from rich.console import Console

from hpm.commands.bench_dense import bench_dense, print_report
from hpm.commands.options import BenchDetectConfig, BenchSegmentConfig

MODELS = ("vit_tiny", "vit_base")
CONFIGS = {"segment": BenchSegmentConfig, "detect": BenchDetectConfig}
SMALL: dict[str, dict[str, Any]] = {
    "segment": {"image_size": 256, "batch_size": 2, "classes": 11},
    "detect": {
        "image_size": 256,
        "batch_size": 2,
        "classes": 10,
        "proposals": 200,
        "box_batch_size": 128,
    },
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "segment": {"image_size": 512, "batch_size": 16},
    "detect": {"image_size": 1024, "batch_size": 8, "window_size": 14},
}


NOTE = (
    "\n\nShares above 100 %: on this CPU the convolutions of the heads run faster than a matrix "
    "product."
)


def typed(options: dict[str, Any]) -> str:
    """image_size=64 -> `--image-size 64`."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(CONFIGS), metavar="segment|detect")
    parser.add_argument("--published", action="store_true", help="sizes of the presets")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--image-size", type=int, help="another side in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps-each", type=int, default=1)
    chosen = parser.parse_args()
    for kind in chosen.kinds:
        options = dict((PUBLISHED if chosen.published else SMALL)[kind])
        options |= {"repeats": chosen.repeats, "steps_each": chosen.steps_each}
        options |= {"image_size": chosen.image_size} if chosen.image_size else {}
        text = io.StringIO()
        for model in chosen.models:
            print_report(
                bench_dense(CONFIGS[kind](model=model, **options)), Console(file=text, width=100)
            )
        write_section(
            f"dense {kind}{' published' if chosen.published else ''}",
            f"## Training and testing of `hpm eval {kind}`\n\n`hpm bench {kind} {typed(options)}` "
            f"with {' and '.join(chosen.models)} on {machine()}.\n\n"
            f"```\n{text.getvalue().rstrip()}\n```{'' if torch.cuda.is_available() else NOTE}",
        )


if __name__ == "__main__":
    main()

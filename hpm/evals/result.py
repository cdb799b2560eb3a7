"""The numbers of an evaluation, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpm.core.errors import counted
from hpm.core.files import write_text

Numbers = dict[str, float]
LABELLED = ("knn", "linear", "attentive", "finetune")


@dataclass
class Result:
    """Numbers of one evaluation.

    values[features][setting][measure]: a setting is `k = 20` of kNN, or else the protocol; the
    measures of a classification are in percent (top1 with its 95 % bootstrap interval top1_low to
    top1_high, top5, mean_per_class). differences: the first run less the second, in points.
    chosen: the hyper-parameters that the held-out part chose. about: what was evaluated and how.
    file: where all of this was written to; unwritable: why it could not be.
    """

    protocol: str
    about: dict[str, Any]
    values: dict[str, dict[str, Numbers]]
    differences: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    chosen: dict[str, Numbers] = field(default_factory=dict)
    hardness: Numbers = field(default_factory=dict)
    file: Path | None = None
    unwritable: str | None = None

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            print_result(self, console)
        return capture.get().rstrip()

    def save(self, file: Path) -> None:
        """Write everything as JSON."""
        names = ("about", "values", "differences", "chosen", "hardness")
        content = {"protocol": self.protocol} | {name: getattr(self, name) for name in names}
        write_text(file, json.dumps(content, indent=2) + "\n")
        self.file = file


def print_result(result: Result, console: Console) -> None:
    """Tables of the numbers, and a line on the hard patches."""
    about = result.about
    if result.values:
        what = f"{about['run']} ({about['weights']}) on {about['data']}"
        if result.protocol in LABELLED:
            tested = counted(about["test_images"], "test image")
            what = f"top-1 of {result.protocol} in %, {what}, {tested}"
        else:
            what = f"{result.protocol} of {what}, {counted(about['images'], 'image')}"
        console.print(what, soft_wrap=True, highlight=False)
        console.print(_table(result))
    if result.protocol == "knn":
        console.print("±: half of the 95 % bootstrap interval", highlight=False)
    for name, settings in result.differences.items():
        for setting, numbers in settings.items():
            at = f" at {setting}" if setting.startswith("k") else ""
            console.print(
                f"{about['run']} less {about['compare']}, {name}{at}: "
                f"{numbers['top1']:+.1f} points "
                f"(95 % interval {numbers['top1_low']:+.1f} to {numbers['top1_high']:+.1f})",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
    _print_hardness(result.hardness, console)
    console.print(f"{about['seconds']:.1f} seconds", highlight=False)


def _table(result: Result) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("features", no_wrap=True)
    settings = list(next(iter(result.values.values())))
    if result.protocol == "knn":
        for setting in settings:
            table.add_column(setting, justify="right", no_wrap=True)
        for name, values in result.values.items():
            table.add_row(name, *[_with_half_width(values[s]) for s in settings])
        return table
    # Of five classes, the true one is always among the best five.
    classes = result.about.get("classes", 1000)
    measures: dict[str, Any] = {
        "top-1": lambda v: f"{v['top1']:.1f}",
        "95 % interval": lambda v: f"{v['top1_low']:.1f} to {v['top1_high']:.1f}",
        **({"top-5": lambda v: f"{v['top5']:.1f}"} if classes > 5 else {}),
        "mean per class": lambda v: f"{v['mean_per_class']:.1f}",
    }
    if result.protocol == "stats":
        measures = {
            "effective rank": lambda v: f"{v['rank']:.1f}",
            "of": lambda v: f"{v['of']:.0f}",
            "likeness of patches": lambda v: (
                f"{v['patch_similarity']:.3f}" if "patch_similarity" in v else ""
            ),
        }
    for title in measures:
        table.add_column(title, justify="right", no_wrap=True)
    for name, values in result.values.items():
        table.add_row(name, *[cell(values[settings[0]]) for cell in measures.values()])
    return table


def _with_half_width(numbers: Numbers) -> str:
    return f"{numbers['top1']:.1f} ± {(numbers['top1_high'] - numbers['top1_low']) / 2:.1f}"


def _print_hardness(hard: Numbers, console: Console) -> None:
    if hard:
        console.print(
            f"predictor, on hidden patches: ranking accuracy {hard['ranking_accuracy']:.3f} "
            f"(0.5 is chance), rank correlation {hard['rank_correlation']:.3f}\n"
            f"teacher, on whole images:     ranking accuracy {hard['mining_accuracy']:.3f} "
            f"(0.5 is chance), rank correlation {hard['mining_correlation']:.3f}",
            soft_wrap=True,
        )
    if "hard_on_objects" in hard:
        console.print(
            f"of the quarter predicted hardest, {100 * hard['hard_on_objects']:.0f} % lies on "
            f"objects ({100 * hard['chance_on_objects']:.0f} % by chance)",
            soft_wrap=True,
        )

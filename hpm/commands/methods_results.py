"""The results of `hpm methods`: tables, a figure, and what can be said of them."""

from __future__ import annotations

import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpm.commands.ablation_plan import Variant
from hpm.commands.ablation_results import DOTS, MEASURES, Results, Table
from hpm.commands.intervals import Interval, interval
from hpm.core.errors import counted
from hpm.core.files import write_atomically

TITLES = {
    "mae": "MAE",
    "predictor": "predictor's loss",
    "hpm": "HPM",
    "hpm_memory": "HPM by memory",
}
# The last tells mining from the loss that is trained for it.
PAIRS = (("predictor", "mae"), ("hpm", "mae"), ("hpm_memory", "mae"), ("hpm", "predictor"))
MINED = ("hpm", "hpm_memory")
PRIMARY = "linear"  # with labels: where pre-training shows first
UNTUNED = "All other options were the same; no method was tuned."


@dataclass
class MethodsResults(Results):
    """The numbers measured so far, of the arms of `hpm methods`."""

    stem: str = "methods"

    def between(self, one: str, other: str, measure: str) -> Interval | None:
        """The paired difference of two arms."""
        ours, theirs = (self.of(self._variant(name), measure) for name in (one, other))
        return interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def comparisons(self) -> list[Table]:
        compared = [name for name in self.measured() if MEASURES[name].compared]
        rows = [
            [
                f"{TITLES[one]} minus {TITLES[other]}",
                *[_cell(self.between(one, other, name), name) for name in compared],
            ]
            for one, other in PAIRS
        ]
        title = "differences at equal time, seed by seed: mean ± half of the 95 % t-interval"
        return [Table(title, ["", *[MEASURES[name].title for name in compared]], rows, 1)]

    def summary(self) -> str:
        """Whether mining helped, as far as these numbers can tell."""
        seeds = min((len(self.values.get(str(v), {})) for v in self.variants), default=0)
        if seeds == 0:
            return ""
        if PRIMARY in self.measured():
            found = {name: self.between(name, "mae", PRIMARY) for name in MINED}
            told = "; ".join(_verdict(TITLES[n], each) for n, each in found.items() if each)
            return f"At equal time, over {counted(seeds, 'seed')}: {told}. {UNTUNED}"
        told = "; ".join(self._without_labels(name) for name in MINED)
        return (
            f"Without labels, this comparison cannot say whether mining helps. At equal time, over "
            f"{counted(seeds, 'seed')}: {told}. These numbers detect a collapse, but do not tell "
            f"which features are better: pass labelled images with --labels. {UNTUNED}"
        )

    def _without_labels(self, arm: str) -> str:
        parts = []
        for measure in ("rank", "patch_similarity"):
            if found := self.between(arm, "mae", measure):
                parts.append(f"{MEASURES[measure].title} {_cell(found, measure)}")
        return f"{TITLES[arm]} minus MAE: {', '.join(parts)}"

    def _variant(self, arm: str) -> Variant:
        return next(each for each in self.variants if each.columns["arm"] == arm)

    def draw(self, measures: list[str]) -> None:
        """Above, a dot per seed and a bar at the mean; below, the differences with their
        intervals."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.6 + 3.6 * len(measures), 4.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, len(measures), sharey="row", squeeze=False)
        for column, measure in enumerate(measures):
            unit = "top-1 in %" if measure in ("knn", "linear") else ""
            self._draw_values(panels[0][column], measure)
            panels[0][column].set_title(MEASURES[measure].title, fontsize=11)
            panels[0][column].set_xlabel(", ".join(filter(None, (unit, DOTS))))
            self._draw_differences(panels[1][column], measure)
            points = " in points" if unit else ""
            panels[1][column].set_xlabel(f"difference{points}, 95 % interval")
        for panel in panels.flat:
            panel.grid(axis="x", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        for first in panels[:, 0]:
            first.set_ylim(3.5, -0.5)  # four rows, from the top
        width = round(13 * figure.get_size_inches()[0])
        figure.suptitle(textwrap.fill(self.summary(), width), fontsize=9, x=0.01, ha="left")
        file: Path = self.file.with_suffix(".png")
        write_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))

    def _draw_values(self, panel: Any, measure: str) -> None:
        for row, variant in enumerate(self.variants):
            if values := list(self.of(variant, measure).values()):
                panel.plot(values, [row] * len(values), "o", color="#4477aa", alpha=0.8)
                panel.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color="black")
        names = [TITLES[str(variant.columns["arm"])] for variant in self.variants]
        panel.set_yticks(range(len(names)), names)

    def _draw_differences(self, panel: Any, measure: str) -> None:
        panel.axvline(0, color="black", linewidth=0.8)
        for row, (one, other) in enumerate(PAIRS):
            if (found := self.between(one, other, measure)) is None:
                continue
            colour = "#4477aa" if found.sign else "#888888"
            panel.errorbar(
                found.mean, row, xerr=found.half or None, fmt="o", color=colour, capsize=3
            )
        names = [f"{TITLES[one]}\nless {TITLES[other]}" for one, other in PAIRS]
        panel.set_yticks(range(len(names)), names, fontsize=8)


def _verdict(title: str, found: Interval) -> str:
    """Whether a method is better than MAE by the linear probe."""
    if found.half is None:
        return (
            f"{title} minus MAE is {found.mean:+.1f} points of linear probe, but one seed cannot "
            "say whether that is chance"
        )
    if found.half == 0:
        return (
            f"{title} minus MAE is {found.mean:+.1f} points of linear probe with each seed; "
            "differences that are all alike cannot say whether that is chance (more seeds or more "
            "labelled images may)"
        )
    numbers = f"{found.mean:+.1f} ± {found.half:.1f} points of linear probe, 95 % interval"
    if found.sign:
        return f"{title} is {'better' if found.sign > 0 else 'worse'} than MAE ({numbers})"
    return (
        f"{title} does not differ significantly from MAE ({numbers}; a difference of about "
        f"{found.visible:.1f} points would have been detected with a probability of 80 %)"
    )


def _cell(found: Interval | None, measure: str) -> str:
    if found is None:
        return ""
    digits = MEASURES[measure].digits
    half = f" ± {found.half:.{digits}f}" if found.half else ""  # of 0, it would say certainty
    return f"{found.mean:+.{digits}f}{half}"

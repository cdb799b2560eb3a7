"""Write the results of an ablation as tables, a CSV file and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hpm.commands.ablation_plan import Variant
from hpm.core.files import write_atomically, write_text


class Measure(NamedTuple):
    """A column of the table."""

    title: str
    digits: int
    drawn: bool = False  # shown in the figure
    compared: bool = True  # shown in the table of differences


MEASURES = {
    "knn": Measure("kNN", 1, drawn=True),
    "linear": Measure("linear probe", 1, drawn=True),
    "rank": Measure("effective rank", 1, drawn=True),
    "patch_similarity": Measure("similarity of patches", 3, drawn=True),
    "ranking_accuracy": Measure("ranking accuracy", 3),
    "mining_accuracy": Measure("mining accuracy", 3),
    "held_out_loss": Measure("held-out loss", 3),
    "minutes": Measure("minutes", 1, compared=False),
}
DOTS = "dots: seeds, bar: mean"
CAPTION = "mean ± standard deviation over the seeds"
IN_PERCENT = "; kNN and linear probe: top-1 in %"


class Table(NamedTuple):
    """Cells of text. The first `labels` columns name the row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    labels: int


@dataclass
class Results:
    """The numbers measured so far: `values[str(variant)][seed][measure]`.

    stem: of the names of its files.
    """

    folder: Path
    variants: list[Variant]
    values: dict[str, dict[int, Mapping[str, float]]] = field(default_factory=dict)
    stem: str = "ablation"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.stem}.md"

    def add(self, variant: Variant, seed: int, values: Mapping[str, float]) -> None:
        self.values.setdefault(str(variant), {})[seed] = values

    def of(self, variant: Variant, measure: str) -> dict[int, float]:
        """The value for each seed."""
        found = self.values.get(str(variant), {})
        return {seed: values[measure] for seed, values in found.items() if measure in values}

    def measured(self) -> list[str]:
        return [name for name in MEASURES if any(self.of(v, name) for v in self.variants)]

    def reference(self, variant: Variant) -> Variant:
        """The variant that this one is compared with: the first arm with the same varied options,
        or, without arms, the first combination."""
        if "arm" not in variant.columns:
            return self.variants[0]
        wanted = variant.columns | {"arm": self.variants[0].columns["arm"]}
        return next(other for other in self.variants if other.columns == wanted)

    def summary(self) -> str:
        """Sentences that stand above the tables; empty if there are none."""
        return ""

    def tables(self) -> list[Table]:
        """A table of means, and one of differences from the reference."""
        return [self.means(), *self.comparisons()]

    def means(self) -> Table:
        """The mean over the seeds of each variant and measure."""
        columns, measures = list(self.variants[0].columns), self.measured()
        head = [*columns, "seeds", *[MEASURES[name].title for name in measures]]
        means = [
            [*_labels(variant), str(len(self.values.get(str(variant), {})))]
            + [_spread(list(self.of(variant, name).values()), name) for name in measures]
            for variant in self.variants
        ]
        title = CAPTION + (IN_PERCENT if "knn" in measures else "")
        return Table(title, head, means, len(columns))

    def comparisons(self) -> list[Table]:
        """A table of differences from the reference, if there is anything else."""
        columns, measures = list(self.variants[0].columns), self.measured()
        others = [variant for variant in self.variants if self.reference(variant) != variant]
        if not others:
            return []
        compared = [name for name in measures if MEASURES[name].compared]
        rows = [
            [*_labels(v), *[_spread(self.differences(v, name), name, "+") for name in compared]]
            for v in others
        ]
        first = self.variants[0]
        title = f"minus {first.columns.get('arm', first)}, seed by seed"
        head = [*columns, *[MEASURES[name].title for name in compared]]
        return [Table(title, head, rows, len(columns))]

    def differences(self, variant: Variant, measure: str) -> list[float]:
        """Differences from the reference, for each seed that both have."""
        own, other = self.of(variant, measure), self.of(self.reference(variant), measure)
        return [own[seed] - other[seed] for seed in own if seed in other]

    def write(self) -> None:
        """Write a table (`.md`), a row per run (`.csv`) and a figure (`.png`)."""
        summary = [f"{self.summary()}\n"] if self.summary() else []
        text = "\n".join([*summary, *(_markdown(table) for table in self.tables())])
        arms = {v.columns["arm"]: v.options for v in self.variants if "arm" in v.columns}
        varied = self.variants[0].columns.keys()
        for arm, options in arms.items():
            own = " ".join(f"{n}={value}" for n, value in options.items() if n not in varied)
            text += f"\n- {arm}: `{own}`"
        write_text(self.file, text.rstrip("\n") + "\n")
        measures = self.measured()
        lines = io.StringIO()
        writer = csv.DictWriter(lines, [*varied, "seed", *measures], restval="")
        writer.writeheader()
        for variant in self.variants:
            for seed, values in self.values.get(str(variant), {}).items():
                writer.writerow(variant.columns | {"seed": seed} | dict(values))
        write_text(self.file.with_suffix(".csv"), lines.getvalue())
        self.draw([name for name in measures if MEASURES[name].drawn])

    def draw(self, measures: list[str]) -> None:
        """Draw a panel per measure, with a dot per seed and a bar at the mean."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        size = (3 + 3.2 * len(measures), 1 + 0.35 * len(self.variants))
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, measures, strict=True):
            for y, variant in enumerate(self.variants):
                values = list(self.of(variant, name).values())
                if values:
                    panel.plot(values, [y] * len(values), "o", color="#4477aa", alpha=0.8)
                    panel.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color="black")
            panel.set_yticks(range(len(self.variants)), [str(v) for v in self.variants])
            unit = ", top-1 in %" if name in ("knn", "linear") else ""
            panel.set_xlabel(f"{MEASURES[name].title}{unit}\n({DOTS})")
            panel.grid(axis="x", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        write_atomically(
            self.file.with_suffix(".png"),
            lambda temporary: figure.savefig(temporary, format="png"),
        )


def print_results(results: Results, console: Console) -> None:
    """Print the tables."""
    if not console.is_terminal:
        console.width = 200  # rich would wrap output to a file or pipe at 80 columns
    for table in results.tables():
        console.print(table.title, highlight=False, markup=False)
        for columns in _side_by_side(table, console.width):
            shown = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for number in columns:
                justify: Literal["left", "right"] = "left" if number < table.labels else "right"
                shown.add_column(table.head[number], justify=justify, width=_width(table, number))
            for row in table.rows:
                shown.add_row(*[Text(row[number]) for number in columns])
            console.print(shown)
    if results.summary():
        console.print(results.summary(), highlight=False, markup=False)


def _side_by_side(table: Table, width: int) -> list[list[int]]:
    """The numbers of the columns that stand beside each other. Where the screen is too narrow for
    all, those that name the row are repeated."""
    labels = list(range(table.labels))
    # The table has an edge on each side.
    blocks, used = [labels[:]], 2 + sum(_width(table, number) + 1 for number in labels)
    room = width - used
    for number in range(table.labels, len(table.head)):
        needed = _width(table, number) + 1
        if needed > room and len(blocks[-1]) > len(labels):
            blocks.append(labels[:])
            room = width - used
        blocks[-1].append(number)
        room -= needed
    return blocks


def _width(table: Table, number: int) -> int:
    """Characters of the widest cell of a column, and of the longest word of its title."""
    cells = [row[number] for row in table.rows]
    return max(1, *map(len, [*cells, *table.head[number].split()]))


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * table.labels + ["---:"] * (len(table.head) - table.labels)]
    rows = ["| " + " | ".join(cells) + " |" for cells in [*lines, *table.rows]]
    return "\n".join([f"{table.title[0].upper()}{table.title[1:]}:", "", *rows, ""])


def _labels(variant: Variant) -> list[str]:
    return [str(value) for value in variant.columns.values()]


def _spread(values: list[float], measure: str, sign: str = "") -> str:
    if not values:
        return ""
    digits = MEASURES[measure].digits
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

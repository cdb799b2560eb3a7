"""The result of an evaluation, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpm.core.errors import counted
from hpm.core.files import write_text
from hpm.core.wording import file_word, sample_word
from hpm.evals.contract import Numbers

TOP5 = "top-5"
CLASSIFICATION = {
    "top-1": "{top1:.1f}",
    "95 % interval": "{top1_low:.1f} to {top1_high:.1f}",
    TOP5: "{top5:.1f}",
    "mean per class": "{mean_per_class:.1f}",
}


@dataclass
class Result:
    """The result of one evaluation.

    values[features][setting][name]: the setting is such as `k = 20`, or else the protocol. Numbers
        of classification are in percent (top1, its 95 % bootstrap interval top1_low to top1_high,
        top5, mean_per_class).
    differences: paired differences, first run minus second, in percentage points.
    chosen: hyper-parameters that were chosen on held-out images.
    hardness: numbers of the loss predictor and the teacher.
    per_class[features][setting][class][name]: numbers by class, if the evaluation has any.
    about: what was evaluated, and with which options.
    columns: columns of the printed table (see `hpm.evals.contract`).
    file: the JSON file; figures are beside it. unwritable: why it could not be written.
    """

    protocol: str
    about: dict[str, Any]
    values: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    differences: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    chosen: dict[str, Numbers] = field(default_factory=dict)
    hardness: Numbers = field(default_factory=dict)
    per_class: dict[str, dict[str, dict[str, Numbers]]] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    columns: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    unwritable: str | None = None

    def __str__(self) -> str:
        console = _text_console()
        with console.capture() as capture:
            print_result(self, console)
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        """The table, and what `print` says below it, for a notebook."""
        console = _text_console()
        with console.capture() as capture:
            _print_below(self, console)
        table = f"<p>{escape(_heading(self))}</p>{_html_table(self)}" if self.values else ""
        below = "<br>".join(escape(capture.get().strip()).splitlines())
        return f"{table}<p>{below}</p>"

    def save(self, file: Path) -> None:
        """Write the result as JSON."""
        content = {
            "protocol": self.protocol,
            "about": self.about,
            "values": self.values,
            "differences": self.differences,
            "chosen": self.chosen,
            "hardness": self.hardness,
            **({"per_class": self.per_class} if self.per_class else {}),
            **({"figures": self.figures} if self.figures else {}),
        }
        write_text(file, json.dumps(content, indent=2) + "\n")
        self.file = file


def _text_console() -> Console:
    """A console whose output is plain text, wherever it goes."""
    return Console(
        width=100, no_color=True, markup=False, force_terminal=False, force_jupyter=False
    )


def print_result(result: Result, console: Console) -> None:
    """Print the tables, and lines about the loss predictor."""
    if result.values:
        console.print(_heading(result), soft_wrap=True, highlight=False)
        console.print(_table(result))
    _print_below(result, console)


def _print_below(result: Result, console: Console) -> None:
    """Print what belongs below the table."""
    if _has_settings(result) and _is_classification(result):
        console.print("±: half of the 95 % bootstrap interval", highlight=False)
    for name, settings in result.differences.items():
        for setting, numbers in settings.items():
            at = f" at {setting}" if setting != result.protocol else ""
            runs = f"{result.about['run']} minus {result.about['compare']}"
            line = f"{runs}, {name}{at}: {_difference(numbers)}"
            console.print(line, soft_wrap=True, highlight=False)
    print_hardness(result.hardness, console, bool(result.about.get("of_clips")))
    console.print(f"{result.about['seconds']:.1f} seconds", highlight=False)


def _heading(result: Result) -> str:
    about, protocol = result.about, result.protocol
    what = f"{about['run']} ({about['weights']}) on {about['data']}"
    what = (
        f"top-1 of {protocol} in %, {what}"
        if _is_classification(result)
        else f"{protocol} of {what}"
    )
    if "test_images" in about:
        return f"{what}, {counted(about['test_images'], f'test {sample_kind(about)}')}"
    if "measured_images" in about:
        return f"{what}, {counted(about['measured_images'], sample_kind(about))}"
    return what


def sample_kind(about: Mapping[str, Any]) -> str:
    """What was evaluated on: `image` or `video`."""
    return file_word(bool(about.get("of_clips")))


def _table(result: Result) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    titles, rows = _cells(result)
    table.add_column(titles[0], no_wrap=True)
    for number, title in enumerate(titles[1:], 1):  # long titles take several lines
        widest = max(map(len, [*title.split(), *(row[number] for row in rows)]))
        table.add_column(title, justify="right", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def _html_table(result: Result) -> str:
    titles, rows = _cells(result)

    def line(tag: str, cells: list[str]) -> str:
        first = f'<{tag} style="text-align:left">{escape(cells[0])}</{tag}>'
        return f"<tr>{first}{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells[1:])}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', titles)}</thead><tbody>{body}</tbody></table>"


def _cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """(titles, rows): one row per kind of features; one column per setting, or per number."""
    if _has_settings(result):
        settings = list(dict.fromkeys(s for values in result.values.values() for s in values))
        rows = [
            [name, *[_with_half_width(values.get(setting, {})) for setting in settings]]
            for name, values in result.values.items()
        ]
        return ["features", *settings], rows
    columns = _columns(result)
    rows = [
        [name, *[_cell(form, next(iter(values.values()))) for form in columns.values()]]
        for name, values in result.values.items()
    ]
    return ["features", *columns], rows


def has_few_classes(about: Mapping[str, Any]) -> bool:
    """Whether top-5 accuracy is always 100 %, and is left out of tables."""
    return about.get("classes", 1000) <= 5


def _columns(result: Result) -> Mapping[str, str]:
    """Title -> format of the numbers."""
    if result.columns:
        return result.columns
    if _is_classification(result):
        few = has_few_classes(result.about)
        return {
            title: form for title, form in CLASSIFICATION.items() if not (few and title == TOP5)
        }
    names = [n for settings in result.values.values() for each in settings.values() for n in each]
    return {name: f"{{{name}:.4g}}" for name in dict.fromkeys(names)}


def _has_settings(result: Result) -> bool:
    """Whether the evaluation has several settings, such as the k of kNN."""
    return any(s != result.protocol for settings in result.values.values() for s in settings)


def _is_classification(result: Result) -> bool:
    return any("top1" in each for settings in result.values.values() for each in settings.values())


def _cell(form: str, numbers: Numbers) -> str:
    """Format numbers as a cell of the table; empty if one is missing."""
    try:
        return form.format_map(numbers)
    except KeyError:
        return ""


def _with_half_width(numbers: Numbers) -> str:
    """The first number, with half of its interval if it has one."""
    for name, value in numbers.items():
        if f"{name}_low" not in numbers:
            return f"{value:.3g}"
        return f"{value:.1f} ± {(numbers[f'{name}_high'] - numbers[f'{name}_low']) / 2:.1f}"
    return ""


def _difference(numbers: Numbers) -> str:
    """The first number, with its interval if it has one."""
    name, value = next(iter(numbers.items()))
    unit = "points" if name == "top1" else name
    if f"{name}_low" not in numbers:
        return f"{value:+.1f} {unit}"
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    return f"{value:+.1f} {unit} (95 % interval {low:+.1f} to {high:+.1f})"


def print_hardness(hard: Numbers, console: Console, clips: bool = False) -> None:
    if hard:
        teacher = f"teacher, on whole {sample_word(clips)}s:"
        console.print(
            f"predictor, on hidden patches: ranking accuracy {hard['ranking_accuracy']:.3f} "
            f"(0.5 is chance), rank correlation {hard['rank_correlation']:.3f}\n"
            f"{teacher:<29} ranking accuracy {hard['mining_accuracy']:.3f} "
            f"(0.5 is chance), rank correlation {hard['mining_correlation']:.3f}",
            soft_wrap=True,
        )
    if "hard_on_objects" in hard:
        console.print(
            f"of the quarter predicted hardest, {100 * hard['hard_on_objects']:.0f} % lies on "
            f"objects ({100 * hard['chance_on_objects']:.0f} % by chance)",
            soft_wrap=True,
        )

"""The page of an evaluation: its numbers, figures and options, and the curves of its trainings."""

from __future__ import annotations

import base64
import json
import time
from html import escape
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, counted
from hpm.core.files import write_text
from hpm.evals.contract import COMPARED, RANDOM, TRAINED, Numbers, installed_options
from hpm.evals.files import changed_options, model_name
from hpm.evals.result import has_few_classes, sample_kind
from hpm.evals.saved import PREDICTOR, evaluation_title, number_title
from hpm.show.curves import Chart, Points, draw_charts
from hpm.show.page import asset, data_block, names_table, page, table
from hpm.training.sessions import read_lines

CHARTS = (
    Chart("Loss", "Mean over the steps since the last reading.", {"loss": "loss"}),
    Chart("Learning rate", "Of the top layer.", {"learning_rate": "AdamW"}, True),
    Chart("Speed", "Images per second.", {"images_per_second": "all processes"}, True),
    Chart("Data wait", "Share of the time spent waiting for images.", {"data_wait": "wait"}, True),
    Chart("Memory", "Peak in GB.", {"memory_gb": "main process"}, True),
)
LEFT_OUT = ("step", "unreadable")
# Shown elsewhere on the page, or of no interest to a reader.
NOT_OPTIONS = ("architecture", "training", "resolved", "fingerprints")
# Shown whether or not they are the defaults.
ALWAYS = ("run", "data", "test", "compare", "weights", "step", "epochs", "steps")
MAX_FIGURE_BYTES = 8_000_000

Values = dict[str, dict[str, Numbers]]  # by features and setting


def write_evaluation_report(file: Path, out: Path | None = None) -> Path:
    """Write the page of an evaluation from its JSON file, and the logs of its trainings.

    out: default: `report.html` in the folder of its trainings, or else beside the JSON file under
    its name. Returns the path. Raises UserError if the file is not of an evaluation.
    """
    result = _read(file)
    about = result["about"]
    if has_few_classes(about):
        result["values"] = _without_top5(result["values"])
    training = file.parent / about["training"] if about.get("training") else None
    own = {model_name(backbone, about.get("compare")) for backbone in (TRAINED, COMPARED, RANDOM)}
    logs = {
        log.parent.name.replace("_", " "): list(read_lines(log))
        for log in sorted(
            training.glob("*/metrics.jsonl") if training else (),
            key=lambda log: (log.parent.name != TRAINED, log),
        )
        if log.parent.name in own
    }
    charts, values = _charts(logs, bool(about.get("of_clips")))
    name = evaluation_title(result["protocol"])
    title = f"hpm: {name} of {about['run']} on {about['data']}"
    parts = [
        _head(result),
        "<h2>Numbers</h2>",
        _numbers(result["values"], "features") if result["values"] else "",
        _hardness(result["hardness"]),
        _differences(result.get("differences", {})),
        _per_class(result.get("per_class", {})),
        _figures(file, result.get("figures", [])),
        f"<h2>Curves</h2>{charts}" if charts else "",
        "<h2>Options</h2>",
        _options(result["protocol"], about),
        data_block("curves", values),
    ]
    style = f"{asset('report.css')}\n{asset('chart.css')}"
    path = out or (training / "report.html" if training else file.with_suffix(".html"))
    write_text(path, page(title, "\n".join(parts), asset("chart.js"), style))
    return path


def _read(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        result.setdefault("hardness", {})
        numbers = result["values"].items() or result["hardness"].items()
        complete = {"run", "data"} <= result["about"].keys() and numbers
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{file}: not the JSON file of an evaluation")
    return result


def _without_top5(values: Values) -> Values:
    return {
        features: {
            setting: {name: value for name, value in numbers.items() if name != "top5"}
            for setting, numbers in settings.items()
        }
        for features, settings in values.items()
    }


def _head(result: dict[str, Any]) -> str:
    about, name = result["about"], evaluation_title(result["protocol"])
    kind = sample_kind(about)
    counts = [
        f"{about[key]:,} {one if about[key] == 1 else several}"
        for key, one, several in (
            ("train_images", f"training {kind}", f"training {kind}s"),
            ("test_images", f"test {kind}", f"test {kind}s"),
            ("measured_images", kind, f"{kind}s"),
            ("classes", "class", "classes"),
        )
        if key in about
    ]
    values = result["values"]
    numbers = next(iter(next(iter(values.values())).values())) if values else result["hardness"]
    tiles = "".join(
        f"<div><b>{value:{_form(value)}}</b><span>{escape(number_title(number))}</span></div>"
        for number, value in numbers.items()
        if not number.endswith(("_low", "_high"))
    )
    measured_on = ": ".join([str(about["data"]), *([", ".join(counts)] if counts else [])])
    return (
        f"<h1>{escape(name[0].upper() + name[1:])} of {escape(str(about['run']))}</h1>\n"
        f"<p>On {escape(measured_on)}.</p>\n"
        f'<p class="faint">Written {time.strftime("%Y-%m-%d %H:%M")}; '
        "<code>hpm report FILE.json</code> rewrites it.</p>\n"
        f'<div class="tiles">{tiles}</div>'
    )


def _numbers(values: dict[str, dict[str, dict[str, float]]], first: str) -> str:
    """A row per features and setting, a column per number with its interval."""
    several = any(len(settings) > 1 for settings in values.values())
    rows = [
        ([features, setting] if several else [features], numbers)
        for features, settings in values.items()
        for setting, numbers in settings.items()
    ]
    names = [
        name
        for name in dict.fromkeys(name for _, numbers in rows for name in numbers)
        if not name.endswith(("_low", "_high"))
    ]
    heads = [first, *["setting"] * several, *map(number_title, names)]
    cells = [
        [*words, *[_with_interval(numbers, name) for name in names]] for words, numbers in rows
    ]
    return f'<div class="scroll numbers">{table(heads, cells)}</div>'


def _differences(values: dict[str, dict[str, dict[str, float]]]) -> str:
    if not values:
        return ""
    return (
        "<h3>Paired differences</h3>\n<p>This run minus the one that it is compared with, on the "
        f"same images, with 95 % intervals.</p>{_numbers(values, 'features')}"
    )


def _hardness(numbers: Numbers) -> str:
    """How well the loss predictor and the teacher rank patches."""
    if not numbers:
        return ""
    shown = {number_title(name): f"{value:{_form(value)}}" for name, value in numbers.items()}
    return f"<h3>{PREDICTOR.capitalize()}</h3>{names_table(shown)}"


def _per_class(values: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    parts = []
    for features, settings in values.items():
        for classes in settings.values():
            rows = {name: {"": numbers} for name, numbers in classes.items()}
            parts.append(
                f"<details><summary>{escape(features)}: {counted(len(rows), 'class', 'classes')}"
                f"</summary>{_numbers(rows, 'class')}</details>"
            )
    return f"<h3>By class</h3>{''.join(parts)}" if parts else ""


def _figures(file: Path, names: list[str]) -> str:
    parts = []
    for name in names:
        path = file.parent / name
        if path.suffix != ".png" or not path.is_file() or path.stat().st_size > MAX_FIGURE_BYTES:
            continue
        content = base64.b64encode(path.read_bytes()).decode()
        caption = _words(path.stem.removeprefix(f"{file.stem}_"))
        parts.append(
            f'<figure class="card whole"><img alt="{escape(caption)}" '
            f'src="data:image/png;base64,{content}"><figcaption>{escape(caption)}</figcaption>'
            "</figure>"
        )
    return f"<h2>Figures</h2>{''.join(parts)}" if parts else ""


def _options(protocol: str, about: dict[str, Any]) -> str:
    """What was evaluated and the options that are not the defaults, then all others."""
    values = {name: about[name] for name in about if name not in NOT_OPTIONS}
    options = installed_options(protocol)
    changed = changed_options(options, about) if options else values
    chosen = {n: v for n, v in values.items() if n in changed or (n in ALWAYS and v is not None)}
    rest = {name: value for name, value in values.items() if name not in chosen}
    more = counted(len(rest), "more value")
    return f"{names_table(chosen)}\n<details><summary>{more}</summary>{names_table(rest)}</details>"


def _charts(logs: dict[str, list[dict[str, Any]]], clips: bool) -> tuple[str, list[dict[str, Any]]]:
    """(HTML of a chart per metric with a curve per training, their values for the script)."""
    found: dict[str, dict[str, Points]] = {}
    for model, lines in logs.items():
        for line in lines:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name not in LEFT_OUT:
                    points = found.setdefault(name, {}).setdefault(model, [])
                    points.append((line["step"], float(value)))
    known = {name for chart in CHARTS for name in chart.names}
    others = [Chart(_words(name), "", {name: name}) for name in sorted(found.keys() - known)]
    last_step = max((line["step"] for lines in logs.values() for line in lines), default=0)
    by_model = [
        (chart.of(clips), found.get(next(iter(chart.names)), {}))
        for chart in [CHARTS[0], *others, *CHARTS[1:]]
    ]
    return draw_charts(by_model, last_step)


def _with_interval(numbers: dict[str, float], name: str) -> str:
    if numbers.get(name) is None:
        return ""
    low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
    form = _form(numbers[name] or high or low or 0.0)
    interval = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    return f"{numbers[name]:{form}}{interval}"


def _form(value: float) -> str:
    """The format of a number: small ones have three digits."""
    return ".3g" if 0 < abs(value) < 1 else ".1f"


def _words(name: str) -> str:
    return name.replace("_", " ")

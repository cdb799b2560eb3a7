"""`hpm compare`: runs beside each other on one self-contained page.

Everything that belongs to a run has its number as `data-run`, or as the class `cN` in charts:
`compare.js` sorts and hides by it.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, counted
from hpm.core.files import disk_error, write_text
from hpm.core.progress import track
from hpm.core.wording import sample_word, worded
from hpm.evals.contract import RAW_PIXELS
from hpm.show.command import evaluation_images, hard_share, prepare, some_images
from hpm.show.compared import (
    LOSS_DEPENDS_ON,
    ComparedRun,
    Interval,
    Measure,
    differing_options,
    hides_tubes,
    read_runs,
)
from hpm.show.curves import Chart, Points, Reference, draw_charts, number
from hpm.show.figures import picture, unavailable_panels
from hpm.show.judgement import references
from hpm.show.moments import Moment, moment_of
from hpm.show.moments_table import ABOUT_ACTUAL, ABOUT_SCALE, panels_table
from hpm.show.options import CompareConfig
from hpm.show.page import asset, breakable, data_block, page
from hpm.show.report_figures import CHARTS, LEFT_OUT
from hpm.show.strips import as_strips
from hpm.weights.resolve import load

Values = list[Any]  # one for each run; None where a run has none


def compare(config: CompareConfig) -> Path:
    """Write the page. Returns its path. Raises UserError on bad input."""
    path = Path(config.out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {config.out}: a comparison is a page; name a .html file")
    runs = read_runs(config.runs)
    differing = differing_options(runs)
    clips = all(run.of_clips for run in runs)
    numbers = _by_run([run.numbers(clips) for run in runs])
    measures = _by_run([run.measures() for run in runs])
    pictures = _pictures(runs, config, clips) if config.images else ""
    curves, curve_values = _curves(runs, clips)
    keys: dict[str, Values] = {"order given": list(range(len(runs)))}
    keys |= {"name": [run.label for run in runs]} | differing | numbers
    own = {m: v for m, v in measures.items() if m.features != RAW_PIXELS}
    keys |= {m.key: [v and v[0] for v in found] for m, found in own.items()}
    words = {title: [_number(v) for v in each] for title, each in numbers.items()}
    table = {"progress": [run.progress for run in runs]} | words
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        f"<p>{escape(_data(runs))}</p>",
        _toolbar(runs, list(keys)),
        "<h2>Runs</h2>",
        _table(runs, table, list(keys)),
        "<h2>Options that differ</h2>",
        _options(runs, differing, list(keys)),
        "<h2>Evaluations</h2>" + _evaluations(runs, measures, list(keys), clips) if own else "",
        f"<h2>Curves</h2>{_about_losses(runs, differing)}{curves}",
        worded("<h2>The same images</h2>", clips) + pictures if pictures else "",
        data_block("curves", curve_values),
        data_block("keys", [[_sorted_by(v) for v in values] for values in keys.values()]),
    ]
    script = f"{asset('chart.js')}\n{asset('compare.js')}"
    files = ("strip.css", "report.css", "chart.css", "compare.css")
    style = "\n".join([*map(asset, files), *(_colour(place) for place in range(len(runs)))])
    try:
        write_text(path, page(f"hpm: {len(runs)} runs", "\n".join(parts), script, style))
    except OSError as error:
        raise disk_error(path, error) from None
    return path


def _by_run(each: list[dict[Any, Any]]) -> dict[Any, Values]:
    """The values of each key, by run."""
    return {key: [found.get(key) for found in each] for key in {k: 0 for one in each for k in one}}


def _data(runs: list[ComparedRun]) -> str:
    data = dict.fromkeys(str(run.options.get("data")) for run in runs)
    return f"On {', '.join(data)}."


def _toolbar(runs: list[ComparedRun], keys: list[str]) -> str:
    """Switches that hide runs, and the order. They need the script, which shows them."""
    chips = "".join(
        f'<button type="button" class="chip" data-number="{place}" aria-pressed="true">'
        f'<i class="swatch c{place}"></i>{escape(run.label)}</button>'
        for place, run in enumerate(runs)
    )
    choices = "".join(f'<option value="{i}">{escape(key)}</option>' for i, key in enumerate(keys))
    return (
        f'<div class="toolbar" hidden><div class="row"><label>Sort by <select id="sort">{choices}'
        '</select></label><button type="button" id="turn" aria-pressed="false">descending</button>'
        f'</div><div class="row">{chips}</div></div>'
    )


def _table(runs: list[ComparedRun], columns: dict[str, Values], keys: list[str]) -> str:
    """A row for each run; titles that are keys sort. Of `predictor on demo: ranking accuracy`, the
    part behind the colon is shown."""
    heads = "".join(
        f'<th scope="col"><button type="button" class="sorter" data-key="{keys.index(title)}">'
        f"{escape(title.rpartition(': ')[2])}</button></th>"
        if title in keys
        else f'<th scope="col">{escape(title)}</th>'
        for title in ["name", *columns]
    )
    rows = "".join(
        f'<tr data-run="{place}"><th scope="row"><i class="swatch c{place}"></i>'
        f"{breakable(run.label)}</th>"
        + "".join(f"<td>{escape(values[place])}</td>" for values in columns.values())
        + "</tr>"
        for place, run in enumerate(runs)
    )
    return (
        f'<div class="scroll compared"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _options(runs: list[ComparedRun], differing: dict[str, Values], keys: list[str]) -> str:
    if not differing:
        return "<p>None: the runs have the same options.</p>"
    words = {
        name: ["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
        for name, values in differing.items()
    }
    return _table(runs, words, keys)


def _evaluations(
    runs: list[ComparedRun], measures: dict[Measure, Values], keys: list[str], clips: bool
) -> str:
    """A card for each number of features, with a line for each run and, where known, its interval;
    a table for those of predictor and teacher."""
    cards: list[str] = []
    tables: dict[str, dict[str, list[str]]] = {}
    for measure, found in sorted(measures.items(), key=lambda each: each[0].name != "top1"):
        if not measure.features:
            columns = tables.setdefault(measure.title, {})
            columns[measure.key] = [_number(v and v[0]) for v in found]
        elif measure.features != RAW_PIXELS:
            same = measures.get(measure._replace(features=RAW_PIXELS), [])
            cards.append(_card(runs, measure, found, next(filter(None, same), None)))
    shown = (
        f'<p class="faint">Bars are 95 % intervals over the test {sample_word(clips)}s; they say '
        f'nothing of other seeds.</p><div class="cards">{"".join(cards)}</div>'
    ) * bool(cards)
    return shown + "".join(
        f"<h3>{escape(title)}</h3>{_table(runs, columns, keys)}"
        for title, columns in tables.items()
    )


def _card(runs: list[ComparedRun], measure: Measure, found: Values, pixels: Interval | None) -> str:
    all_ends = [end for v in [*found, pixels and pixels[:1]] if v for end in v if end is not None]
    ends = [end for end in all_ends if math.isfinite(end)] or [0.0]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def across(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    def say(value: float) -> str:
        return f"{value:.1f}" if measure.name == "top1" else number(value)

    line = f'<i class="line" style="left:{across(pixels[0])}"></i>' if pixels else ""
    lines = []
    for place, (run, value) in enumerate(zip(runs, found, strict=True)):
        if value is None:
            continue
        middle, least, most = value
        point = interval = words = ""
        if math.isfinite(middle):
            point = f'<i class="point" style="left:{across(middle)}"></i>'
        if least is not None and most is not None:
            right = f"{100 * (high - most) / (high - low):.2f}%"
            interval = f'<i class="interval" style="left:{across(least)};right:{right}"></i>'
            words = f" ({say(least)} to {say(most)})"
        lines.append(
            f'<div class="measured c{place}" data-run="{place}"><span>{escape(run.label)}</span>'
            f"<span><b>{say(middle)}</b>{words}</span>"
            f'<div class="range">{line}{interval}{point}</div></div>'
        )
    about = measure.about + (f". Line: raw pixels, {say(pixels[0])}" if pixels else "")
    return (
        f'<section class="card"><h3>{escape(measure.title)}</h3><p class="faint">{escape(about)}.'
        f'</p><div class="measures">{"".join(lines)}</div></section>'
    )


def _curves(runs: list[ComparedRun], clips: bool) -> tuple[str, list[dict[str, Any]]]:
    """(HTML of a chart per metric with a curve per run, their values for the script)."""
    found: dict[str, dict[str, Points]] = {}
    for run in runs:
        for line in run.metrics:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name not in LEFT_OUT:
                    points = found.setdefault(name, {}).setdefault(run.label, [])
                    points.append((line["step"], float(value)))
    shared = _shared_references(runs)
    known = [
        (
            Chart(_title(chart, label), chart.about, {}, chart.from_zero, shared.get(name)),
            found.pop(name, {}),
        )
        for chart in (chart.of(clips) for chart in CHARTS)
        for name, label in chart.names.items()
    ]
    others = [(Chart(_words(name), "", {}), points) for name, points in sorted(found.items())]
    last_step = max((line["step"] for run in runs for line in run.metrics), default=0)
    places = {run.label: place for place, run in enumerate(runs)}
    html, values = draw_charts([*known[:1], *others, *known[1:]], last_step, places)
    return html or "<p>No measurements yet.</p>", values


def _shared_references(runs: list[ComparedRun]) -> dict[str, Reference]:
    """The references of metrics, where they are the same for all runs that have the metric."""
    each: dict[str, list[Reference | None]] = {}
    for run in runs:
        own = references(run.options)
        for name in {name for line in run.metrics for name in line}:
            each.setdefault(name, []).append(own.get(name))
    return {
        name: found[0]
        for name, found in each.items()
        if found[0] is not None and len({*found}) == 1
    }


def _title(chart: Chart, label: str) -> str:
    return f"{chart.title}, {label}" if len(chart.names) > 1 else chart.title


def _words(name: str) -> str:
    below, _, last = name.rpartition("/")
    words = f"{last}, {below}".removesuffix(", ").replace("_", " ")
    return words[0].upper() + words[1:]


def _about_losses(runs: list[ComparedRun], differing: dict[str, Values]) -> str:
    depends_on = [*LOSS_DEPENDS_ON, "patch_size"]
    if len({hides_tubes(run.options) for run in runs}) > 1:
        depends_on += ["mask", "mine_tubes"]
    different = [name for name in depends_on if name in differing]
    if not different:
        return ""
    return (
        '<p class="warning">Losses do not compare: the runs differ in '
        f"{escape(', '.join(different))}.</p>"
    )


def _pictures(runs: list[ComparedRun], config: CompareConfig, clips: bool) -> str:
    """The same images or clips, drawn by every run that can."""
    data = config.data or str(runs[0].options.get("data"))
    columns: dict[str, Moment] = {}
    problems: dict[str, list[str]] = {}
    for run in track(runs, "drawing", total=len(runs)):
        try:
            columns[run.label] = _draw(run, data, config)
        except UserError as error:
            problems.setdefault(str(error), []).append(run.label)
    said = "".join(
        f'<p class="warning">Not drawn: {escape(_all_or(labels, runs))}: {escape(problem)}.</p>'
        for problem, labels in problems.items()
    )
    if not columns:
        return said
    places = [place for place, run in enumerate(runs) if run.label in columns]
    about = (
        "drawn by the latest weights of each run. Bright patches are hard. Hidden patches are "
        "grey: as many, and as hard, as at the end of each training. "
        f"{ABOUT_ACTUAL} {ABOUT_SCALE} Without a predictor there is no predicted loss."
    )
    return (
        f"<p>{'Clips' if clips else 'Images'} of {escape(data)}, {worded(about, clips)}</p>"
        f"{said}{panels_table(columns, sample_word(clips), places)}"
    )


def _all_or(labels: list[str], runs: list[ComparedRun]) -> str:
    return "all runs" if len(labels) == len(runs) else ", ".join(labels)


def _draw(run: ComparedRun, data: str, config: CompareConfig) -> Moment:
    """Raises UserError if the images are not there, or the weights cannot draw them."""
    trained = load(str(run.folder))
    missing = unavailable_panels(trained)
    if "actual" in missing:
        raise UserError(missing["actual"])
    prepare(trained, config.device)
    some = some_images(data, config.images, config.seed, trained, config.data is not None)
    (batch,) = evaluation_images(some, trained, len(some))
    if not len(batch.images):
        kind = sample_word(run.of_clips)
        raise UserError(f"{data}: none of {counted(len(some), kind)} can be read")
    share = hard_share(None, trained)
    shown = picture(trained, batch.images, batch.indices, share, seed=config.seed)
    return moment_of(as_strips(shown), trained.step or 0)


def _sorted_by(value: Any) -> Any:
    """The value as a key to sort by: JSON has no NaN, which sorts as a missing value does."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "" if value is None else number(float(value))


def _colour(place: int) -> str:
    """The colour and dash of a run: hues far apart for neighbouring numbers."""
    dash = ("", "6 3", "2 3")[place % 3]
    border = ("solid", "dashed", "dotted")[place % 3]
    hue = round(320 + place * 137.508) % 360
    return (
        f".c{place} {{ --stroke: hsl({hue} 65% var(--light)); }}\n"
        f".plot .curve.c{place} {{ stroke-dasharray: {dash or 'none'}; }}\n"
        f".key.c{place}::before {{ border-top-style: {border}; }}"
    )

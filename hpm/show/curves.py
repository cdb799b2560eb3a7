"""Draw curves as inline SVG, which needs no script.

`chart.js` adds a cursor that shows the values at a step in all charts. It reads them from the data
block `curves`, which has one entry per `.chart`, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from hpm.core.wording import worded

BINS = 150  # a long curve is reduced to the lowest and highest point of each bin
MAX_MARKED = 30  # curves of at most so many points get a mark at each point


Points = list[tuple[int, float]]  # steps and values


class Reference(NamedTuple):
    """The value of a metric before anything is learned, and a few words on it."""

    value: float
    name: str


class Chart(NamedTuple):
    """A chart: its title and caption, and a label for each metric that it shows. `reference`: a
    line across it."""

    title: str
    about: str
    names: dict[str, str]
    from_zero: bool = False
    reference: Reference | None = None

    def of(self, clips: bool) -> Chart:
        """This chart, of a run on images or on clips."""
        names = {name: worded(label, clips) for name, label in self.names.items()}
        title, about = worded(self.title, clips), worded(self.about, clips)
        return self._replace(title=title, about=about, names=names)


@dataclass
class Curve:
    """Finite values at increasing steps. `place`: the number of its colour."""

    name: str
    steps: list[int]
    values: list[float]
    place: int = 0


def make_curve(name: str, points: Points, place: int = 0) -> Curve:
    """Reduce points (step, value) to at most about 2 * BINS, keeping spikes."""
    points = sorted((step, value) for step, value in points if math.isfinite(value))
    if len(points) > 2 * BINS:
        inner, kept = points[1:-1], [points[0]]
        for number in range(BINS):
            binned = inner[number * len(inner) // BINS : (number + 1) * len(inner) // BINS]
            extremes = {min(binned, key=lambda p: p[1]), max(binned, key=lambda p: p[1])}
            kept += sorted(extremes)
        points = [*kept, points[-1]]
    return Curve(name, [step for step, _ in points], [value for _, value in points], place)


def draw_charts(
    charts: Iterable[tuple[Chart, dict[str, Points]]],
    last_step: int,
    places: Mapping[str, int] | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """(HTML of the charts with the points of their curves, by label; their values for the script).

    Charts and curves without finite values are left out; the HTML is empty if all are.

    places: numbers of the colours by label. Default: in order, chart by chart.
    """
    cards, values = [], []
    for chart, labelled in charts:
        curves = [
            make_curve(label, points, place if places is None else places[label])
            for place, (label, points) in enumerate(labelled.items())
        ]
        curves = [curve for curve in curves if curve.values]
        if curves:
            card, numbers = draw_chart(chart, curves, last_step)
            cards.append(card)
            values.append(numbers)
    return (f'<div class="cards">{"".join(cards)}</div>' if cards else ""), values


def draw_chart(chart: Chart, curves: list[Curve], last_step: int) -> tuple[str, dict[str, Any]]:
    """Draw a card with curves over the steps 0 to `last_step`: (HTML, values for the script)."""
    title, reference = chart.title, chart.reference
    low, high = _range(curves, chart.from_zero, reference)
    right = max(last_step, 1)

    def across(step: float) -> float:
        return round(1000 * step / right, 1)

    def down(value: float) -> float:
        return round(1000 * (high - value) / (high - low), 1)

    lines, labels, keys = [], [], []
    for tick in _ticks(low, high):
        lines.append(f'<path class="grid" d="M0 {down(tick)}H1000"/>')
        labels.append(f'<span class="y" style="top:{down(tick) / 10}%">{_tick(tick)}</span>')
    if reference is not None:
        place = down(reference.value)
        lines.append(f'<path class="reference" d="M0 {place}H1000"/>')
    for tick in _ticks(0, right):
        labels.append(f'<span class="x" style="left:{across(tick) / 10}%">{_tick(tick)}</span>')
    for curve in curves:
        place = curve.place
        points = [(across(s), down(v)) for s, v in zip(curve.steps, curve.values, strict=True)]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        lines.append(f'<path class="curve c{place}" d="{path}"/>')
        if len(points) <= MAX_MARKED:
            marks = "".join(f"M{x} {y}h0" for x, y in points)
            lines.append(f'<path class="marks c{place}" d="{marks}"/>')
        labels.append(f'<i class="dot c{place}" hidden></i>')
        keys.append(
            f'<span class="key c{place}">{escape(curve.name)} '
            f"<b>{number(curve.values[-1])}</b></span>"
        )
    if reference is not None:
        keys.append(f'<span class="key reference">{escape(reference.name)}</span>')
    label = "; ".join(
        f"{curve.name} from {number(curve.values[0])} at step {curve.steps[0]} to "
        f"{number(curve.values[-1])} at step {curve.steps[-1]}"
        for curve in curves
    )
    step = max(curve.steps[-1] for curve in curves)
    html = (
        f'<figure class="card chart"><h3>{escape(title)}</h3>'
        f'<div class="keys">{"".join(keys)}<span class="at">step {step:,}</span></div>'
        f'<div class="plot" tabindex="0"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(f"{title}: {label}")}">{"".join(lines)}'
        f'<path class="cursor" d="" /></svg>{"".join(labels)}</div>'
        f"<figcaption>{escape(chart.about)}</figcaption></figure>"
    )
    values = {
        "right": right,
        "low": low,
        "high": high,
        "step": step,
        "curves": [
            {"steps": curve.steps, "values": [_short(v) for v in curve.values]} for curve in curves
        ],
    }
    return html, values


def _range(
    curves: list[Curve], from_zero: bool, reference: Reference | None
) -> tuple[float, float]:
    """Lowest and highest value of the axis, with a margin."""
    values = [value for curve in curves for value in curve.values]
    values += [reference.value] if reference is not None else []
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _ticks(low: float, high: float) -> list[float]:
    places = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(place) for place in places if low <= place <= high]


def number(value: float) -> str:
    """Three digits: 0.120, 12.5, 12,500, 1.50e-5; just below 1, as many as tell it from 1, such as
    0.9995. `chart.js` formats numbers alike."""
    size = abs(value)
    if size >= 999.5:
        return f"{value:,.0f}"
    if size < 1e-12:
        return "0"
    digits = 3
    if 0.99 <= size < 1:
        digits = min(9, 1 - math.floor(math.log10(1 - size)))
    return f"{value:#.{digits}g}".removesuffix(".").replace("e-0", "e-")


def _tick(value: float) -> str:
    """A round number, exactly."""
    if abs(value) >= 1000:
        return number(value)
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}".replace("e-0", "e-")


def _short(value: float) -> float:
    return float(f"{value:.6g}")

"""Curves of a run as a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpm.core.errors import UserError, nearest
from hpm.core.wording import of_clips
from hpm.show.curves import Chart, Points, make_curve, number
from hpm.show.drawing import Drawing, new_figure
from hpm.show.judgement import references
from hpm.show.report_figures import CHARTS, points_by_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("Reconstruction loss", "Ranking accuracy", "Probes of the features")
WIDTH, HEIGHT = 4.2, 2.7  # inches of a chart
PER_ROW = 3
COLOURS = ("#a3367a", "#2a6fb0", "#9a5b00")
DASHES = ("-", "--", ":")


def plot_metrics(
    metrics: list[dict[str, Any]], options: dict[str, Any], names: Sequence[str] = ()
) -> Drawing:
    """Draw the charts that have one of these metrics, or else the most telling ones.

    names: such as `learning_rate`. Raises UserError for a metric that the run has not logged.
    """
    points = points_by_metric(metrics)
    for name in names:
        if name not in points:
            known = ", ".join(sorted(points)) or "none"
            raise UserError(f"no metric '{name}'{nearest(name, points)} (logged: {known})")
    charts = [chart for chart in CHARTS if _is_shown(chart, points, names)]
    known_names = {name for chart in charts for name in chart.names}
    charts += [Chart(name, "", {name: name}) for name in names if name not in known_names]
    across = min(len(charts), PER_ROW) or 1
    down = -(-len(charts) // PER_ROW) or 1
    figure = new_figure(WIDTH * across, HEIGHT * down, dpi=90)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    marks, clips = references(options), of_clips(options)
    for chart, axis in zip(charts, axes, strict=False):
        reference = marks.get(next(iter(chart.names)))
        _draw(axis, chart.of(clips)._replace(reference=reference), points)
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    if not charts:
        axes[0].text(0.5, 0.5, "no measurements yet", ha="center", va="center")
    return Drawing(figure)


def _is_shown(chart: Chart, points: dict[str, Points], names: Sequence[str]) -> bool:
    if names:
        return any(name in chart.names for name in names)
    return chart.title in SHOWN and any(name in points for name in chart.names)


def _draw(axis: Axes, chart: Chart, points: dict[str, Points]) -> None:
    for place, (name, label) in enumerate(chart.names.items()):
        curve = make_curve(label, points.get(name, []))
        if curve.values:
            axis.plot(
                curve.steps,
                curve.values,
                DASHES[place % 3],
                color=COLOURS[place % 3],
                marker="o" if len(curve.steps) <= 12 else None,
                markersize=3,
                linewidth=1.4,
                label=f"{label} {number(curve.values[-1])}",
            )
    if chart.reference is not None:
        axis.axhline(
            chart.reference.value,
            color="#888888",
            linewidth=0.8,
            linestyle=":",
            label=chart.reference.name,
        )
    axis.set_title(chart.title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=7, frameon=False)

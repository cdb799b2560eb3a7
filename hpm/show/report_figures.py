"""The figures of a report: curves of the metrics, and panels of held-out images over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hpm.core.wording import of_clips, sample_word, worded
from hpm.show.curves import Chart, Points, draw_charts
from hpm.show.drawing import LOSSES
from hpm.show.figures import panel_title
from hpm.show.gallery import figure, strip
from hpm.show.judgement import references
from hpm.show.moments import Animations, Moment
from hpm.show.moments_table import ABOUT_ACTUAL, ABOUT_SCALE, panels_table
from hpm.show.options import PANELS
from hpm.show.page import by_device
from hpm.show.scale import bar
from hpm.show.strips import frames_text

CHARTS = (
    Chart(
        "Reconstruction loss",
        "Error of the hidden patches. In training, it may rise when harder patches are hidden; on "
        "held-out images, masks are random throughout.",
        {"reconstruction_loss": "training", "held_out/reconstruction_loss": "held-out images"},
    ),
    Chart(
        "Predictor loss",
        "How well the predictor orders the hidden patches by their loss.",
        {"predictor_loss": "training"},
    ),
    Chart(
        "Ranking accuracy",
        "Share of pairs of patches that are in the right order. The student predicts the losses of "
        "hidden patches, the teacher those of whole images.",
        {
            "ranking_accuracy": "student, training",
            "held_out/ranking_accuracy": "student, held-out images",
            "held_out/mining_accuracy": "teacher, held-out images",
        },
    ),
    Chart(
        "Rank correlation on held-out images",
        "Spearman's, between predicted and actual losses of an image's patches. The teacher's "
        "predictions choose the hard patches.",
        {"held_out/rank_correlation": "student", "held_out/mining_correlation": "teacher"},
    ),
    Chart(
        "Hard patches on objects, held-out images",
        "Share of the quarter of patches predicted to be hardest that lies on objects.",
        {"held_out/hard_on_objects": "hardest", "held_out/chance_on_objects": "all patches"},
        from_zero=True,
    ),
    Chart(
        "Probes of the features",
        "Top-1 in % on the labelled images, features frozen.",
        {"probe/linear": "linear", "probe/knn": "kNN"},
    ),
    Chart(
        "Hard share",
        "Share of the hidden patches that are mined; the others are hidden at random.",
        {"hard_share": "mined"},
        from_zero=True,
    ),
    Chart(
        "Learning rate",
        "Warm-up, then half a cosine, or constant with a cooldown (--schedule).",
        {"learning_rate": "AdamW"},
        True,
    ),
    Chart(
        "EMA decay", "Weight of the old teacher weights in each update.", {"ema_decay": "teacher"}
    ),
    Chart(
        "Gradient norm",
        "Before clipping. Frequent spikes suggest a high learning rate.",
        {"grad_norm": "training"},
        from_zero=True,
    ),
    Chart("Speed", "Images per second.", {"images_per_second": "all processes"}, True),
    Chart(
        "Data wait",
        "Share of the time spent waiting for images. If it is high, pass more --workers.",
        {"data_wait": "main process"},
        from_zero=True,
    ),
    Chart("Memory", "Peak in GB.", {"memory_gb": "main process"}, from_zero=True),
)
# Not drawn: other counts of steps, and numbers that the report gives elsewhere.
LEFT_OUT = ("step", "epoch", "unreadable", "probe/seconds")


def charts_section(
    metrics: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[str, list[dict[str, Any]]]:
    """(HTML of the charts of all logged metrics, their values for the script)."""
    known_references, clips = references(options), of_clips(options)
    points = points_by_metric(metrics)
    known = {name for chart in CHARTS for name in chart.names}
    others = [Chart(name.replace("_", " "), "", {name: name}) for name in points.keys() - known]
    last_step = max((line["step"] for line in metrics), default=0)
    labelled = [
        (
            chart._replace(reference=known_references.get(next(iter(chart.names)))),
            {label: points[name] for name, label in chart.names.items() if name in points},
        )
        for chart in [*(chart.of(clips) for chart in CHARTS), *sorted(others)]
    ]
    html, values = draw_charts(labelled, last_step)
    if not html:
        return "<p>No measurements yet.</p>", values
    hint = f"Steps from left to right. {by_device('Point at', 'Touch')} a curve to read its values."
    return f'<p class="faint">{hint}</p>\n{html}', values


def points_by_metric(metrics: list[dict[str, Any]]) -> dict[str, Points]:
    """The points of each metric that is drawn, by name."""
    points: dict[str, Points] = {}
    for line in metrics:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in LEFT_OUT:
                points.setdefault(name, []).append((line["step"], float(value)))
    return points


def moments_section(
    moments: list[Moment], options: dict[str, Any], measured: Sequence[int] | None = None
) -> str:
    """A table with a row per held-out image and a column per moment, and a switch of the panel.

    measured: the steps of all moments, of which some may be left out.
    """
    clips = of_clips(options)
    kind = sample_word(clips)
    if not moments:
        reason = f"no {kind}s are held out" if options.get("holdout") == 0 else "none were kept"
        return f"<p>No pictures: {reason}.</p>"
    about = (
        f"Each row is a held-out {kind}, each column a training step. Bright patches are hard, "
        f"hidden patches grey. {ABOUT_ACTUAL}"
    )
    if any(moment.predicted is not None for moment in moments):
        about += f" The teacher predicts losses from the whole {kind}. {ABOUT_SCALE}"
    if clips:
        times = options["frames"] // options["patch_size"][0]
        about += f" Shown of each clip: {frames_text(options['frames'], times)}."
    columns = {f"step {moment.step:,}": moment for moment in moments}
    gaps = _gaps([moment.step for moment in moments], measured or [])
    if gaps:
        about += (
            f" {len(moments)} of {len(moments) + sum(gaps.values())} measurements are shown (⋯ is "
            "where others are left out); figures/ has all."
        )
    pictures = panels_table(columns, f"held-out {kind}", gaps=gaps)
    return f"<p>{worded(about, clips)}</p>{pictures}"


def _gaps(shown: list[int], measured: Sequence[int]) -> dict[int, int]:
    """How many measurements are left out after each column, by its number."""
    found = {
        place: sum(step < other < following for other in measured)
        for place, (step, following) in enumerate(itertools.pairwise(shown))
    }
    return {place: count for place, count in found.items() if count}


def animations_section(shown: Animations | None) -> str:
    """The panels of some held-out clips as animations; empty without any."""
    if shown is None:
        return ""
    below = bar(shown.scale) if shown.scale else ""
    rows = []
    for number, panels in enumerate(shown.clips, 1):
        known = [name for name in PANELS if name in panels]
        figures = "".join(
            figure(
                panels[name],
                panel_title(name, clips=True),
                f"held-out clip {number}",
                below * (name in LOSSES),
            )
            for name in known
        )
        rows.append(f'<div class="clip">{strip(figures, len(known))}</div>')
    return f'<h3 id="clips">Held-out clips at step {shown.step:,}</h3>{"".join(rows)}'

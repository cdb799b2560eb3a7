"""The figures of a report: curves of the metrics, and panels of held-out images over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from hpm.show.curves import Chart, Points, draw_charts
from hpm.show.figures import TITLES
from hpm.show.gallery import figure, strip
from hpm.show.moments import Moment
from hpm.show.options import PANELS
from hpm.show.page import colours, image_uri

CHARTS = (
    Chart(
        "Reconstruction loss",
        "Error of the hidden patches. It may rise when harder patches are hidden.",
        {"reconstruction_loss": "training"},
    ),
    Chart(
        "Predictor loss",
        "How well the predictor orders pairs of hidden patches; 0.693 is chance (relative loss).",
        {"predictor_loss": "training"},
    ),
    Chart(
        "Ranking accuracy",
        "Share of pairs of hidden patches in the right order; 0.5 is chance.",
        {
            "ranking_accuracy": "training",
            "held_out/ranking_accuracy": "held out",
            "held_out/mining_accuracy": "held out, teacher",
        },
    ),
    Chart(
        "Rank correlation, held out",
        "Spearman's, between predicted and actual losses of an image's patches; 0 is chance. The "
        "teacher sees whole images; its predictions choose the hard patches.",
        {"held_out/rank_correlation": "student", "held_out/mining_correlation": "teacher"},
    ),
    Chart(
        "Hard patches on objects, held out",
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
    Chart("Learning rate", "Warm-up, then half a cosine.", {"learning_rate": "AdamW"}, True),
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

VIEWS = {
    "predicted": "predicted loss",
    "actual": "actual loss",
    "mask": "mask",
    "reconstruction": "reconstruction",
}
SMALL = 64  # images up to this side, in pixels, are stored as PNG and shown without smoothing


def charts_section(metrics: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(HTML of the charts of all logged metrics, their values for the script)."""
    points: dict[str, Points] = {}
    for line in metrics:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in LEFT_OUT:
                points.setdefault(name, []).append((line["step"], float(value)))
    known = {name for chart in CHARTS for name in chart.names}
    others = [Chart(name.replace("_", " "), "", {name: name}) for name in points.keys() - known]
    last_step = max((line["step"] for line in metrics), default=0)
    labelled = [
        (chart, {label: points[name] for name, label in chart.names.items() if name in points})
        for chart in [*CHARTS, *sorted(others)]
    ]
    html, values = draw_charts(labelled, last_step)
    if not html:
        return "<p>No measurements yet.</p>", values
    hint = "Steps from left to right. Point at a curve, or touch it, to read its values."
    return f'<p class="faint">{hint}</p>\n{html}', values


def moments_section(moments: list[Moment], options: dict[str, Any]) -> str:
    """A table with a row per held-out image and a column per moment, and a switch of the panel."""
    if not moments:
        reason = "no images are held out" if options.get("holdout") == 0 else "none were kept"
        return f"<p>No pictures: {reason}.</p>"
    about = (
        "Each row is a held-out image, each column a training step. Bright patches are hard; each "
        "map has its own scale. Hidden patches are grey. The actual loss is the mean over random "
        "masks"
    )
    predicted = any(moment.predicted is not None for moment in moments)
    about += "; the teacher predicts losses from the whole image." if predicted else "."
    columns = {f"step {moment.step:,}": moment for moment in moments}
    return f"<p>{about}</p>{panels_table(columns, 'held-out image')}"


def panels_table(
    columns: dict[str, Moment], row_name: str, runs: Sequence[int] | None = None
) -> str:
    """A table with a row per image and a column per moment, by title, and a switch of the panel.

    runs: the number of the run that a column is of, for a script to find its cells.
    """
    moments = list(columns.values())
    views = [name for name in VIEWS if any(getattr(m, name) is not None for m in moments)]
    first = next((n for n in views if all(getattr(m, n) is not None for m in moments)), views[0])
    largest = max(moments, key=lambda moment: moment.images.shape[:2])
    marks = [""] * len(moments) if runs is None else [f' data-run="{run}"' for run in runs]
    switch = "".join(
        f'<input type="radio" name="view" id="view-{name}"{" checked" * (name == first)}>'
        f'<label for="view-{name}">{VIEWS[name]}</label>'
        for name in views
    )
    height, width = largest.images.shape[1:3]
    photos = [_photo(image) for image in largest.images]
    style = [f".frame {{ aspect-ratio: {width} / {height}; }}"]
    style += [f".p{row} {{ background-image: url({uri}); }}" for row, uri in enumerate(photos)]
    style += [
        f"#view-{name}:checked ~ .scroll .{name} {{ display: block; }}"
        f"#view-{name}:focus-visible + label {{ outline: 2px solid var(--second); }}"
        f"#view-{name}:checked + label {{ border-color: var(--accent); color: var(--accent); }}"
        for name in views
    ]
    rows = "".join(
        f'<tr><th scope="row"><div class="frame"><i class="photo p{row}" role="img" '
        f'aria-label="{row_name} {row + 1}"></i></div></th>'
        + "".join(
            f"<td{mark}>{_cell(moment, views, row, title)}</td>"
            for (title, moment), mark in zip(columns.items(), marks, strict=True)
        )
        + "</tr>"
        for row in range(len(largest.images))
    )
    heads = "".join(
        f'<th scope="col"{mark}>{escape(title)}</th>'
        for title, mark in zip(columns, marks, strict=True)
    )
    smooth = "" if max(height, width) > SMALL else " sharp"
    return (
        f"<style>{''.join(style)}</style>"
        f'<div class="moments{smooth}" style="--columns:{len(moments) + 1}">{switch}'
        f'<div class="scroll"><table><thead><tr><th scope="col">image</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def animations_section(step: int, clips: list[dict[str, np.ndarray]]) -> str:
    """The panels of some held-out clips as animations; empty without any. clips: see
    `moments.read_animations`."""
    if not clips:
        return ""
    rows = []
    for number, panels in enumerate(clips, 1):
        known = [name for name in PANELS if name in panels]
        figures = "".join(
            figure(panels[name], TITLES[name], "", f"held-out clip {number}") for name in known
        )
        rows.append(f'<div class="clip">{strip(figures, len(known))}</div>')
    return f'<h3 id="clips">Held-out clips at step {step:,}</h3>{"".join(rows)}'


def _cell(moment: Moment, views: list[str], row: int, column: str) -> str:
    """All panels of one image at one moment, stacked; the page shows one of them."""
    if row >= len(moment.images):
        return ""
    about = escape(f"of image {row + 1}, {column}")
    shown = []
    for name in views:
        values = getattr(moment, name)
        if values is None:
            continue
        alt = f'alt="{VIEWS[name]} {about}"'
        if name == "mask":
            hidden = values[row][..., None] * np.array([128, 128, 128, 255], np.uint8)
            shown.append(
                f'<i class="view mask photo p{row}"><img class="map" {alt} '
                f'src="{image_uri(hidden)}"></i>'
            )
        elif name == "reconstruction":
            shown.append(f'<img class="view {name}" {alt} src="{_photo(values[row])}">')
        else:
            uri = image_uri(colours(values[row]))
            shown.append(f'<img class="view map {name}" {alt} src="{uri}">')
    return f'<div class="frame">{"".join(shown)}</div>'


def _photo(image: np.ndarray) -> str:
    """A data URI: PNG for small images, JPEG, which takes a tenth of the bytes, for larger ones."""
    return image_uri(image, "PNG" if max(image.shape) <= SMALL else "JPEG")

"""`report.html`: the results of a run on one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.core.files import disk_error, write_text
from hpm.evals.saved import saved_evaluations
from hpm.show import curves
from hpm.show.curves import draw_chart, make_curve
from hpm.show.moments import Moment, read_moments
from hpm.show.options import ReportConfig
from hpm.show.page import colours, data_block, image_uri, page
from hpm.training.sessions import FINISHED, Session, read_lines, read_sessions
from hpm.weights.run_folder import Run


class Chart(NamedTuple):
    """A title, a line that explains it, the metrics that it shows and what they are called."""

    title: str
    about: str
    names: dict[str, str]
    from_zero: bool = False


CHARTS = (
    Chart(
        "Reconstruction loss",
        "Mean loss of the hidden patches. It may rise as harder patches are hidden.",
        {"reconstruction_loss": "training"},
    ),
    Chart(
        "Predictor loss",
        "Loss of the loss predictor; for the relative loss, 0.693 is chance.",
        {"predictor_loss": "training"},
    ),
    Chart(
        "Ranking accuracy",
        "Fraction of pairs of hidden patches that are ranked correctly; 0.5 is chance.",
        {
            "ranking_accuracy": "training",
            "held_out/ranking_accuracy": "held out",
            "held_out/mining_accuracy": "held out, teacher",
        },
    ),
    Chart(
        "Rank correlation, held out",
        "Spearman correlation of predicted and actual losses within an image; 0 is chance. The "
        "teacher, which mining uses, sees whole images.",
        {"held_out/rank_correlation": "student", "held_out/mining_correlation": "teacher"},
    ),
    Chart(
        "Hard patches on objects, held out",
        "Fraction of the quarter of patches predicted to be hardest that lies on objects.",
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
        "Fraction of the hidden patches that are mined; the others are random.",
        {"hard_share": "mined"},
        from_zero=True,
    ),
    Chart("Learning rate", "Linear warm-up, then half a cosine.", {"learning_rate": "AdamW"}, True),
    Chart("EMA decay", "Decay of the teacher's moving average per step.", {"ema_decay": "teacher"}),
    Chart(
        "Gradient norm",
        "Norm before clipping.",
        {"grad_norm": "training"},
        from_zero=True,
    ),
    Chart("Speed", "Images per second.", {"images_per_second": "all processes"}, True),
    Chart(
        "Data wait",
        "Fraction of the time spent waiting for images. If it is high, try more --workers.",
        {"data_wait": "main process"},
        from_zero=True,
    ),
    Chart("Memory", "Peak in GB.", {"memory_gb": "main process"}, from_zero=True),
)
# Not drawn: a second way to count steps, a number told in words, the price of a probe.
LEFT_OUT = ("step", "epoch", "unreadable", "probe/seconds")

# Options that `schedule.resolve` fills in: what they became was mostly not chosen.
WORKED_OUT = (
    "patch_size", "hard_share_start", "hard_share_end", "secondary_mask_ratio", "decoder_dim",
    "decoder_depth", "decoder_heads", "precision",
)  # fmt: skip

VIEWS = {
    "predicted": "predicted loss",
    "actual": "actual loss",
    "mask": "mask",
    "reconstruction": "reconstruction",
}
SMALL = 64  # images up to this side are kept without loss, their pixels shown sharp
NAMED = 20  # unreadable images that are listed


def run_report(config: ReportConfig) -> Path:
    """Write the report of a run folder again. Raises UserError where it is none."""
    folder = Path(config.run).expanduser()
    if not Run(folder).config_file.is_file():
        raise UserError(f"{config.run}: no run folder of hpm pretrain (it has no config.yaml)")
    out = Path(config.out).expanduser() if config.out else Run(folder).report
    try:
        return write_report(folder, out)
    except OSError as error:
        raise disk_error(out, error) from None


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write `report.html` from what is in the run folder. Returns its path."""
    run = Run(folder)
    metrics = read_lines(folder / "metrics.jsonl")
    metrics = [line for line in metrics if isinstance(line.get("step"), int)]
    sessions = read_sessions(folder)
    options = _options(run.config_file)
    steps = {line["step"] for line in metrics}
    moments = read_moments(run.moments, steps | {0})
    charts, values = _charts(metrics)
    parts = [
        _head(folder, options, metrics, sessions),
        _problems(folder, metrics, sessions),
        "<h2>Predicted difficulty during training</h2>",
        _moments(moments, options),
        "<h2>Curves</h2>",
        charts,
        _evaluations(folder),
        "<h2>Use the backbone</h2>",
        _usage(folder),
        "<h2>Configuration</h2>",
        _configuration(options),
        "<h2>Sessions</h2>",
        _sessions(sessions, run.config_file),
        data_block("curves", values),
    ]
    style = f"{STYLE}\n{curves.STYLE}"
    path = out or run.report
    write_text(path, page(f"hpm: {folder}", "\n".join(parts), curves.SCRIPT, style))
    return path


def _head(
    folder: Path, options: dict[str, Any], metrics: list[dict[str, Any]], sessions: list[Session]
) -> str:
    """Which run, how far it is, and its latest numbers."""
    last: dict[str, Any] = {}
    for line in metrics:
        last |= line
    last_session = sessions[-1] if sessions else None
    total = last_session.total_steps if last_session else options.get("steps")
    step = last.get("step", 0)
    if last_session and last_session.failed:
        step = last_session.last_step or step
    progress = f"step {step:,} of {total:,}" if total else f"step {step:,}"
    if last_session and last_session.failed:
        progress += ", failed"
    elif step and step == total:
        progress += ", finished"
    elif last_session and last_session.reason is None:
        progress += ", in training when this was written"
    facts = [
        f"{options.get('model')} on {options.get('data')}, {_size(options)} pixels",
        f"mask {options.get('mask')}, {options.get('mask_ratio')} hidden",
        progress,
    ]
    numbers = [
        (title, f"{last[name]:.4g}")
        for name, title in (
            ("reconstruction_loss", "reconstruction loss"),
            ("ranking_accuracy", "ranking accuracy"),
            ("held_out/ranking_accuracy", "ranking accuracy, held out"),
            ("probe/linear", "linear probe, %"),
            ("images_per_second", "images per second"),
        )
        if name in last
    ]
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in numbers)
    return (
        f"<h1>{escape(str(folder))}</h1>\n<p>{escape('; '.join(facts))}.</p>\n"
        f'<p class="faint">Written {time.strftime("%Y-%m-%d %H:%M")} from the run folder; '
        "<code>hpm report RUN</code> rewrites it.</p>\n"
        f'<div class="tiles">{tiles}</div>'
    )


def _problems(folder: Path, metrics: list[dict[str, Any]], sessions: list[Session]) -> str:
    """What went wrong, as far as it is known; nothing where nothing did."""
    found = []
    log = folder / "train.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    unreadable = sorted(set(re.findall(r"^\S+ \S+ cannot read (.*), passed over$", text, re.M)))
    count = max([int(line["unreadable"]) for line in metrics if "unreadable" in line], default=0)
    count = max(count, len(unreadable))
    if count:
        names = "".join(f"<li>{escape(line)}</li>" for line in unreadable[:NAMED])
        more = f"<li>and {len(unreadable) - NAMED} more, all in train.log</li>"
        found.append(
            f"<details><summary>{counted(count, 'image')} could not be read and "
            f"{'were' if count > 1 else 'was'} passed over</summary>"
            f"<ul>{names}{more * (len(unreadable) > NAMED)}</ul></details>"
        )
    for number, session in enumerate(sessions):
        latest = number == len(sessions) - 1
        where = f"at step {session.last_step:,}" if session.last_step is not None else ""
        if session.reason is None and not latest:
            found.append(f"The training that began {escape(session.began)} was killed.")
        elif session.reason not in (None, FINISHED):
            ended, goes_on = "Failed" if session.failed else "Stopped", ""
            if not latest:
                goes_on = f"; it went on from step {sessions[number + 1].first_step:,}"
            found.append(f"{ended} {where}: {escape(str(session.reason))}{goes_on}.")
    if not found:
        return ""
    items = "".join(f"<li>{item}</li>" for item in found)
    return (
        f'<div class="card problems"><h3 class="warning">What went wrong</h3><ul>{items}</ul></div>'
    )


def _moments(moments: list[Moment], options: dict[str, Any]) -> str:
    """A row per held-out image, a column per moment, and a way to switch what is shown."""
    if not moments:
        reason = "no images are held out" if options.get("holdout") == 0 else "none were kept"
        return f"<p>No pictures: {reason}.</p>"
    last = moments[-1]
    views = [name for name in VIEWS if getattr(last, name) is not None]
    switch = "".join(
        f'<input type="radio" name="view" id="view-{name}"{" checked" * (place == 0)}>'
        f'<label for="view-{name}">{VIEWS[name]}</label>'
        for place, name in enumerate(views)
    )
    height, width = last.images.shape[1:3]
    photos = [_photo(image) for image in last.images]
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
        f'aria-label="held-out image {row + 1}"></i></div></th>'
        + "".join(f"<td>{_cell(moment, views, row)}</td>" for moment in moments)
        + "</tr>"
        for row in range(len(last.images))
    )
    heads = "".join(f'<th scope="col">step {moment.step:,}</th>' for moment in moments)
    smooth = "" if max(height, width) > SMALL else " sharp"
    about = (
        "Each row is an image that is held out; each column a moment of the training. Bright is "
        "hard, each map on its own scale; hidden patches are grey. The actual loss is the mean "
        "over random masks"
    )
    about += ", the predicted one the teacher's, who sees all." if "predicted" in views else "."
    return (
        f"<p>{about}</p>"
        f"<style>{''.join(style)}</style>"
        f'<div class="moments{smooth}" style="--columns:{len(moments) + 1}">{switch}'
        f'<div class="scroll"><table><thead><tr><th scope="col">image</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _cell(moment: Moment, views: list[str], row: int) -> str:
    """All views of one image at one moment, one over the other; the page shows one of them."""
    if row >= len(moment.images):
        return ""
    about = f"of image {row + 1} at step {moment.step}"
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
    """A data URI: small images without loss, larger ones as JPEG, a tenth of the size."""
    return image_uri(image, "PNG" if max(image.shape) <= SMALL else "JPEG")


def _charts(metrics: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """All metrics that there are, and what the script needs of them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in LEFT_OUT:
                points.setdefault(name, []).append((line["step"], float(value)))
    known = {name for chart in CHARTS for name in chart.names}
    others = [Chart(name.replace("_", " "), "", {name: name}) for name in points.keys() - known]
    last_step = max((line["step"] for line in metrics), default=0)
    cards, values = [], []
    for chart in [*CHARTS, *sorted(others)]:
        drawn = [
            make_curve(called, points[name])
            for name, called in chart.names.items()
            if name in points
        ]
        drawn = [curve for curve in drawn if curve.steps]
        if drawn:
            card, numbers = draw_chart(chart.title, chart.about, drawn, last_step, chart.from_zero)
            cards.append(card)
            values.append(numbers)
    if not cards:
        return "<p>No measurements yet.</p>", values
    hint = "Steps from left to right. Point at a curve, or touch it, to read its values."
    return f'<p class="faint">{hint}</p>\n<div class="cards">{"".join(cards)}</div>', values


def _evaluations(folder: Path) -> str:
    """What `hpm eval` has measured of this run; nothing where that is nothing."""
    rows = ""
    for saved in saved_evaluations(folder):
        whose = saved.weights or ""
        whose += "" if saved.step is None else f", step {saved.step:,}"
        for row in saved.rows or [[saved.file.name, "", "", "unreadable"]]:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in [*row, whose])
            rows += f"<tr>{cells}</tr>"
    if not rows:
        return ""
    titles = ("evaluation", "data", "features", "numbers", "weights")
    heads = "".join(f"<th>{title}</th>" for title in titles)
    return (
        "<h2>Evaluations</h2>\n<p>Top-1 in %, with its 95 % bootstrap interval.</p>\n"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def _usage(folder: Path) -> str:
    path = json.dumps(str(folder))
    python = (
        f"import hpm\n\nencoder = hpm.load_encoder({path})\n"
        "pooled, patches = encoder(images)  # uint8 [B C H W] -> [B D], [B N D]"
    )
    shell = (
        f"hpm eval linear {folder} LABELLED_IMAGES   # how good are the features?\n"
        f"hpm export {folder} --to timm --out backbone_timm.safetensors\n"
        f"hpm show {folder} IMAGES --out figure.png"
    )
    return f"<pre>{escape(python)}</pre>\n<pre>{escape(shell)}</pre>"


def _configuration(options: dict[str, Any]) -> str:
    """The options that were set, then those that are as they would be anyway."""
    defaults = json.loads(
        json.dumps(
            {
                field.name: field.default
                for field in dataclasses.fields(PretrainConfig)
                if field.default is not dataclasses.MISSING
            }
        )
    )
    chosen = {
        name: value
        for name, value in options.items()
        if name not in WORKED_OUT and (name not in defaults or value != defaults[name])
    }
    rest = {name: value for name, value in options.items() if name not in chosen}
    return (
        f"{_table(chosen)}\n<details><summary>{len(rest)} options with default or derived "
        f"values</summary>{_table(rest)}</details>"
    )


def _sessions(sessions: list[Session], config_file: Path) -> str:
    """Versions and device of the latest session, and when each began and ended."""
    if not sessions:  # of a version that recorded none
        lines = config_file.read_text(encoding="utf-8").splitlines()
        noted = [line.lstrip("# ") for line in lines if line.startswith("#")]
        return f"<p>{'<br>'.join(map(escape, noted))}</p>"
    rows = "".join(
        f"<tr><td>{escape(session.began)}</td><td>{session.first_step:,}</td>"
        f"<td>{escape(session.ended or '')}</td>"
        f"<td>{'' if session.last_step is None else format(session.last_step, ',')}</td>"
        f"<td>{escape(str(session.environment.get('device')))}, "
        f"{counted(session.environment.get('processes') or 1, 'process', 'processes')}</td></tr>"
        for session in sessions
    )
    heads = "".join(
        f"<th>{name}</th>" for name in ("began", "from step", "ended", "at step", "device")
    )
    environment = {k: v for k, v in sessions[-1].environment.items() if v is not None}
    return (
        f'{_table(environment)}\n<div class="scroll sessions"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<table class="names"><tbody>{rows}</tbody></table>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _size(options: dict[str, Any]) -> str:
    size = options.get("image_size")
    return " x ".join(map(str, size)) if isinstance(size, list) else f"{size} x {size}"


def _options(path: Path) -> dict[str, Any]:
    """config.yaml as it is: a report must not depend on what the options are called today."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{path} is damaged: repair it")
    return options


STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; margin: 1rem 0; }
.tiles div { display: flex; flex-direction: column; }
.tiles b { font-size: 1.4rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--faint); font-size: 0.9rem; }
.problems { border-color: var(--warning); }
.problems h3 { margin: 0; }
.moments input { position: absolute; opacity: 0; pointer-events: none; }
.moments label {
  display: inline-block; margin: 0 0.4rem 0.6rem 0; padding: 0.3rem 0.8rem; cursor: pointer;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
}
.moments { position: relative; }
.moments table { table-layout: fixed; min-width: calc(var(--columns) * 4.2rem); width: 100%;
  max-width: calc(var(--columns) * 9rem); }
.moments th, .moments td { padding: 0 0 4px 4px; border: 0; }
.moments th:first-child { position: sticky; left: 0; z-index: 1; padding: 0 4px 4px 0;
  background: var(--paper); }
.moments tbody tr { border: 0; }
.moments thead th { font-size: 0.8rem; font-weight: 400; color: var(--faint); }
.frame { position: relative; background: var(--line); overflow: hidden; border-radius: 3px; }
.frame .photo, .frame img { position: absolute; inset: 0; width: 100%; height: 100%; }
.photo { background-size: 100% 100%; }
.sharp .photo, .sharp img { image-rendering: pixelated; }
.frame .view { display: none; }
.names th { white-space: nowrap; font-weight: 400; color: var(--faint); }
.sessions { margin-top: 1rem; } .sessions th, .sessions td { white-space: nowrap; }
details { margin: 0.5rem 0; }
""".strip()

"""`report.html`: the results of a run on one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Collection
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.core.files import disk_error, write_text
from hpm.core.wording import file_word, of_clips, worded
from hpm.evals.saved import Row, number_title, saved_evaluations
from hpm.show.curves import number
from hpm.show.evaluation_report import write_evaluation_report
from hpm.show.judgement import judge
from hpm.show.moments import measured_steps, read_animations, read_moments
from hpm.show.options import ReportConfig
from hpm.show.page import asset, data_block, names_table, page, table
from hpm.show.readings import read_metrics
from hpm.show.report_figures import animations_section, charts_section, moments_section
from hpm.show.status import Status, read_status
from hpm.training.resume import FOLLOWING
from hpm.training.sessions import FINISHED, Session, read_sessions
from hpm.weights.own import encoder_call
from hpm.weights.run_folder import RunFolder, following_options, latest_values

TILES = {
    "reconstruction_loss": "reconstruction loss, training",
    "held_out/reconstruction_loss": "reconstruction loss, held-out images",
    "ranking_accuracy": "ranking accuracy, training",
    "held_out/ranking_accuracy": "ranking accuracy, held-out images",
    "probe/linear": "linear probe, %",
    "images_per_second": "images per second",
}
MAX_LISTED = 20  # unreadable images, and ends of sessions


def run_report(config: ReportConfig) -> Path:
    """Rewrite the report of a run folder or an evaluation. Raises UserError if it is neither."""
    folder = Path(config.run).expanduser()
    out = Path(config.out) if config.out else None
    write = write_evaluation_report if folder.suffix == ".json" else write_report
    if write is write_report and not RunFolder(folder).config_file.is_file():
        raise UserError(
            f"{config.run}: no run folder of hpm pretrain (it has no config.yaml), and no JSON "
            "file of an evaluation"
        )
    try:
        return write(folder, out)
    except OSError as error:
        raise disk_error(out or folder, error) from None


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write `report.html` from the files of the run folder. Returns its path."""
    run = RunFolder(folder)
    metrics = read_metrics(folder)
    sessions = read_sessions(folder)
    given, derived = _read_options(run.config_file)
    options = given | derived
    last_step = max((line["step"] for line in metrics), default=0)
    moments = read_moments(run.moments, last_step)
    measured = measured_steps(run.moments, last_step)
    charts, values = charts_section(metrics, options)
    clips = of_clips(options)
    parts = [
        _head(folder, options, metrics, read_status(folder, options, metrics, sessions)),
        _problems(folder, metrics, sessions, clips),
        "<h2>Predicted difficulty during training</h2>",
        moments_section(moments, options, measured),
        animations_section(read_animations(run.moments, last_step)),
        "<h2>Curves</h2>",
        charts,
        _evaluations(folder),
        "<h2>Use the backbone</h2>",
        _usage(folder, clips),
        "<h2>Configuration</h2>",
        _configuration(options, derived or FOLLOWING),
        "<h2>Sessions</h2>",
        _sessions(sessions, run.config_file),
        data_block("curves", values),
    ]
    style = f"{asset('strip.css')}\n{asset('report.css')}\n{asset('chart.css')}"
    path = out or run.report
    write_text(path, page(f"hpm: {folder}", "\n".join(parts), asset("chart.js"), style))
    return path


def _head(
    folder: Path, options: dict[str, Any], metrics: list[dict[str, Any]], status: Status
) -> str:
    """Name, state, judgement and latest numbers of the run."""
    last, clips = latest_values(metrics), of_clips(options)
    facts = [
        f"{options.get('model')} on {options.get('data')}, {_size(options)} pixels",
        f"mask {options.get('mask')}, {100 * options.get('mask_ratio', 0):.3g}\u00a0% hidden",
    ]
    tiles = "".join(
        f"<div><b>{number(last[name])}</b><span>{worded(title, clips)}</span></div>"
        for name, title in TILES.items()
        if name in last
    )
    judgement = judge(options, metrics, saved_evaluations(folder), status.total)
    state = f'<span class="state {status.state}">{status.state}</span>'
    times = f"; {status.times}" if status.times else ""
    return (
        f"<h1>{escape(str(folder))} {state}</h1>\n"
        f'<p class="verdict">{escape(judgement)}</p>\n'
        f"<p>S{status.steps[1:]}{times}. {escape('; '.join(facts))}.</p>\n"
        f'<p class="faint">Written {time.strftime("%Y-%m-%d %H:%M")} from the run folder; '
        "<code>hpm report RUN</code> rewrites it.</p>\n"
        f'<div class="tiles">{tiles}</div>'
    )


def _problems(
    folder: Path, metrics: list[dict[str, Any]], sessions: list[Session], clips: bool
) -> str:
    """A list of problems; empty if there were none."""
    found = []
    log = folder / "train.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    unreadable = sorted(set(re.findall(r"^\S+ \S+ cannot read (.*), passed over$", text, re.M)))
    count = max([int(line["unreadable"]) for line in metrics if "unreadable" in line], default=0)
    count = max(count, len(unreadable))
    if count:
        kind = file_word(clips)
        names = "".join(f"<li>{escape(line)}</li>" for line in unreadable[:MAX_LISTED])
        more = f"<li>and {len(unreadable) - MAX_LISTED} more, all in train.log</li>"
        found.append(
            f"<details><summary>{counted(count, kind)} could not be read and "
            f"{'were' if count > 1 else 'was'} passed over</summary>"
            f"<ul>{names}{more * (len(unreadable) > MAX_LISTED)}</ul></details>"
        )
    ends = []
    for place, session in enumerate(sessions):
        latest = place == len(sessions) - 1
        where = f"at step {session.last_step:,}" if session.last_step is not None else ""
        if session.reason is None and not latest:
            ends.append(f"The session that began {escape(session.began)} was killed.")
        elif session.reason not in (None, FINISHED):
            ended, resumed = "Failed" if session.failed else "Stopped", ""
            if not latest:
                resumed = f"; resumed from step {sessions[place + 1].first_step:,}"
            ends.append(f"{ended} {where}: {escape(str(session.reason))}{resumed}.")
    if len(ends) > MAX_LISTED:
        earlier = counted(len(ends) - MAX_LISTED, "earlier session")
        found.append(f"{earlier} ended early, listed below.")
    found += ends[-MAX_LISTED:]
    if not found:
        return ""
    items = "".join(f"<li>{item}</li>" for item in found)
    return f'<div class="card problems"><h3 class="warning">Problems</h3><ul>{items}</ul></div>'


def _evaluations(folder: Path) -> str:
    """A card for each of this run's evaluations; empty if there are none."""
    groups: dict[tuple[str, str], list[Row]] = {}
    unreadable = ""
    for saved in saved_evaluations(folder):
        if saved.rows is None:
            unreadable += f'<p class="warning">{escape(saved.file.name)} cannot be read.</p>'
        for row in saved.rows or ():
            about = "; ".join(filter(None, (row.options, saved.whose)))
            groups.setdefault((row.title, about), []).append(row)
    cards = "".join(_evaluation(title, about, rows) for (title, about), rows in groups.items())
    if not cards and not unreadable:
        return ""
    return (
        f'<h2>Evaluations</h2>\n<p class="faint">In brackets: 95 % bootstrap intervals.</p>\n'
        f'<div class="cards">{cards}</div>{unreadable}'
    )


def _evaluation(title: str, about: str, rows: list[Row]) -> str:
    """A row for each kind of features and a column for each number; of the predictor, which has no
    features, a row for each number."""
    wide = ""
    if rows[0].features:
        names = list(dict.fromkeys(name for row in rows for name in row.main))
        heads = ["features", *map(number_title, names)]
        wide = " wide" * (len(names) > 1)
        shown = table(heads, [[row.features, *(_measured(row, n) for n in names)] for row in rows])
    else:
        last = rows[-1]
        shown = names_table({number_title(name): _measured(last, name) for name in last.main})
    return (
        f'<section class="card evaluation{wide}"><h3>{escape(title)}</h3>'
        f'<p class="faint">{escape(about)}</p><div class="scroll">{shown}</div></section>'
    )


def _measured(row: Row, name: str) -> str:
    """A number with its interval; empty if the row lacks it."""
    if name not in row.main:
        return ""
    value, low, high = row.main[name]
    shown = f"{value:.1f}" if name == "top1" else number(value)
    return shown if low is None or high is None else f"{shown} ({low:.1f} to {high:.1f})"


def _usage(folder: Path, clips: bool) -> str:
    images = "CLIPS" if clips else "IMAGES"
    path = json.dumps(str(folder))
    python = f"import hpm\n\nencoder = hpm.load_encoder({path})\n{encoder_call(clips)}"
    export = "onnx --out backbone.onnx" if clips else "timm --out backbone_timm.safetensors"
    word = shlex.quote(str(folder))
    shell = (
        f"hpm eval linear {word} LABELLED_{images}   # how good are the features?\n"
        f"hpm export {word} --to {export}\n"
        f"hpm show {word} {images} --out figure.png"
    )
    return f"<pre>{escape(python)}</pre>\n<pre>{escape(shell)}</pre>"


def _configuration(options: dict[str, Any], derived: Collection[str]) -> str:
    """Options that were given other values than their defaults, then all others. derived: names of
    those that were not given."""
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
        if name not in derived and (name not in defaults or value != defaults[name])
    }
    rest = {name: value for name, value in options.items() if name not in chosen}
    return (
        f"{names_table(chosen)}\n<details><summary>{counted(len(rest), 'more option')}, default or "
        f"derived</summary>{names_table(rest)}</details>"
    )


def _sessions(sessions: list[Session], config_file: Path) -> str:
    """Versions and device of the latest session, and begin and end of each session."""
    if not sessions:  # written by a version that did not record sessions
        lines = config_file.read_text(encoding="utf-8").splitlines()
        noted = [line.lstrip("# ") for line in lines if line.startswith("#")]
        return f"<p>{'<br>'.join(map(escape, noted))}</p>"
    rows = [
        (
            session.began,
            f"{session.first_step:,}",
            session.ended or "",
            "" if session.last_step is None else f"{session.last_step:,}",
            f"{session.environment.get('device')}, "
            f"{counted(session.environment.get('processes') or 1, 'process', 'processes')}",
        )
        for session in sessions
    ]
    titles = ("began", "from step", "ended", "at step", "device")
    environment = {k: v for k, v in sessions[-1].environment.items() if v is not None}
    return f'{names_table(environment)}\n<div class="scroll sessions">{table(titles, rows)}</div>'


def _size(options: dict[str, Any]) -> str:
    size = options.get("image_size")
    frames = f"{options['frames']} frames of " if of_clips(options) else ""
    return frames + (" x ".join(map(str, size)) if isinstance(size, list) else f"{size} x {size}")


def read_options(path: Path) -> dict[str, Any]:
    """All options that config.yaml has, also those that were not given; unchecked, so that reports
    of older versions can be rewritten."""
    given, derived = _read_options(path)
    return given | derived


def _read_options(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options, those that follow from them); none follow in files of older versions."""
    try:
        text = path.read_text(encoding="utf-8")
        options, derived = yaml.safe_load(text), following_options(text)
    except (OSError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{path} is damaged: repair it, or restore it from a copy")
    return options, derived

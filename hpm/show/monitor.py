"""Evaluate, draw and record a run during training."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np

from hpm.core import distributed
from hpm.core.errors import UserError, one_line
from hpm.core.signals import Interrupted
from hpm.data.loader import evaluation_batches
from hpm.data.sources import Subset
from hpm.evals.loss_maps import evaluate_losses
from hpm.evals.ongoing import OngoingProbe
from hpm.show.drawing import draw
from hpm.show.figures import Picture, picture
from hpm.show.moments import keep_animations, keep_moment
from hpm.show.report import write_report
from hpm.show.strips import as_strips
from hpm.training import sessions
from hpm.training.run import PretrainingRun

FIGURE_IMAGES = 8
# A report that takes longer than this, because it reads a long log, is written so rarely that it
# takes a small share of the time: all processes wait for it.
QUICK_REPORT, REPORT_SHARE = 1.0, 0.02  # seconds, share


def evaluate(run: PretrainingRun) -> None:
    """Measure the losses on the held-out images and draw some of them, in the main process; all
    processes run sharded models."""
    held_out, config = run.images.held_out, run.config
    if held_out is None or not run.runs_models:
        return
    run.model.eval()
    with run.autocast():
        values = evaluate_losses(run.trained, held_out, run.device, config.seed, run.log.info_once)
        if values:
            run.log.metrics(run.step, {f"held_out/{n}": v for n, v in values.items()})
            run.log.info(f"step {run.step}, held-out {run.sample}s: {in_words(values)}")
    run.model.train()
    shown = picture_held_out(run)
    if shown is not None and distributed.is_main():
        file = run.files.figures / f"step_{run.step:08d}.png"
        with run.log.never_fail("drawing a figure"):
            draw(shown, file, f"{config.out}, step {run.step} of {run.total_steps}")
            run.log.figure(run.step, file)


def in_words(values: dict[str, float]) -> str:
    """The measures of `evaluate_losses` as a short row; correlations are in the log of metrics."""
    words = [f"loss {values['reconstruction_loss']:.3f}"]
    if "ranking_accuracy" in values:
        words.append(
            f"ranking accuracy {values['ranking_accuracy']:.3f} "
            f"(teacher {values['mining_accuracy']:.3f}; 0.5 is chance)"
        )
    if "hard_on_objects" in values:
        words.append(
            f"hardest patches on objects {100 * values['hard_on_objects']:.0f} % "
            f"({100 * values['chance_on_objects']:.0f} % by chance)"
        )
    return ", ".join(words)


def picture_held_out(run: PretrainingRun) -> Picture | None:
    """Compute the panels of some held-out images and save them for the report.

    Runs in the main process, or in all if the models are sharded. Returns None without held-out
    images.
    """
    held_out, config = run.images.held_out, run.config
    if held_out is None or not run.runs_models:
        return None
    some = Subset(held_out, np.arange(min(FIGURE_IMAGES, len(held_out))))
    batches = evaluation_batches(
        some, run.view_size, config.channels, FIGURE_IMAGES, sampling=run.sampling
    )
    batch = next(iter(batches), None)
    if batch is None or not len(batch.images):
        return None
    run.model.eval()
    with run.autocast():
        share = run.num_hard(max(run.step - 1, 0)) / run.num_hidden
        shown = picture(run.trained, batch.images, batch.indices, share, seed=config.seed)
    run.model.train()
    strips = as_strips(shown)
    if not distributed.is_main():
        return strips
    with run.log.never_fail("keeping pictures for the report"):
        keep_moment(strips, run.files.moments, run.step)
        if strips is not shown:
            keep_animations(shown, run.files.moments, run.step)
    return strips


def probe(run: PretrainingRun, ongoing: OngoingProbe) -> None:
    """Probe the features on the labelled images, and save the weights if they are the best yet."""
    start = time.perf_counter()
    run.model.eval()
    values = ongoing.measure(run.trained_encoder, run.device, run.log.info_once)
    run.model.train()
    seconds = time.perf_counter() - start
    run.probe_seconds += seconds
    best = values["linear"] > run.best_probe.get("linear", -1)
    if best:
        run.best_probe = {"step": run.step} | values
        run.save_best()
    values |= {"seconds": seconds}
    run.log.metrics(run.step, {f"probe/{name}": value for name, value in values.items()})
    run.log.info(
        f"step {run.step}, probe: kNN {values['knn']:.1f} %, linear {values['linear']:.1f} %"
        f"{', the best yet' if best else ''} ({seconds:.1f} s)"
    )


@contextlib.contextmanager
def session_recorded(run: PretrainingRun) -> Iterator[None]:
    """Record when this session begins and ends, and why; write the report at its end."""
    if not distributed.is_main():
        yield
        return
    folder = run.files.folder
    with run.log.never_fail("recording the session"):
        sessions.begin(folder, run.step, run.total_steps, run.device)
    reason, failed = sessions.FINISHED, False
    try:
        yield
    except BaseException as stopped:
        reason = _reason(stopped)
        failed = not isinstance(stopped, (Interrupted, KeyboardInterrupt))
        raise
    finally:
        with run.log.never_fail("recording the session"):
            sessions.end(folder, run.step, reason, failed)
        refresh_report(run)


def refresh_report(run: PretrainingRun) -> None:
    """Write the report."""
    if distributed.is_main():
        with run.log.never_fail("writing the report"):
            write_report(run.files.folder)


def seldom(report: Callable[[], object]) -> Callable[[], None]:
    """Calls `report`, unless it is slow and was called a short time before."""
    ended, took = -math.inf, 0.0

    def call() -> None:
        nonlocal ended, took
        start = time.monotonic()
        if took > QUICK_REPORT and start - ended < took / REPORT_SHARE:
            return
        report()
        ended = time.monotonic()
        took = ended - start

    return call


def _reason(stopped: BaseException) -> str:
    """Why a run ended early, in one line."""
    if isinstance(stopped, Interrupted):
        return f"by {signal.Signals(stopped.signal_number).name}, saved"
    if isinstance(stopped, KeyboardInterrupt):
        return "at once, by Ctrl-C"
    text = one_line(stopped)
    return text if isinstance(stopped, UserError) else f"{type(stopped).__name__}: {text}"

"""What is read, measured, drawn and recorded while a run trains."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.errors import UserError, one_line
from hpm.core.files import write_tensors
from hpm.core.signals import Interrupted
from hpm.data.loader import Batch, evaluation_batches
from hpm.data.sources import Subset
from hpm.evals.loss_maps import evaluate_losses
from hpm.evals.ongoing import OngoingProbe
from hpm.show.figures import Picture, draw, picture
from hpm.show.moments import keep_moment
from hpm.show.report import write_report
from hpm.training import sessions
from hpm.training.log import memory_gb
from hpm.training.not_finite import advice, judge_checkpoints
from hpm.training.sessions import read_lines
from hpm.training.state import State
from hpm.weights.checkpoint import list_checkpoints

FIGURE_IMAGES = 8


@dataclass
class Step:
    """What one step leaves behind; nothing of it has been waited for."""

    losses: Tensor  # [4]: reconstruction, predictor, ranking accuracy, gradient norm
    batch: Batch
    visible_ids: Tensor
    hidden_ids: Tensor


class Window:
    """The steps since the losses were last read, and the time that they took."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.data_wait = 0.0
        self.began = time.perf_counter()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the wait for it is counted."""
        start = time.perf_counter()
        batch = next(batches)
        self.data_wait += time.perf_counter() - start
        return batch


def read(state: State, window: Window, num_hard: int) -> None:
    """Fetch the losses of the window, log their means, and stop if one is not finite.

    The only place where the loop waits for the device.
    """
    rows = distributed.mean(torch.stack([step.losses for step in window.steps])).cpu()
    seconds = time.perf_counter() - window.began
    finite = rows[:, [0, 1, 3]].isfinite().all(1)
    if not finite.all():
        _stop_not_finite(state, window, int((~finite).nonzero()[0]))
    state.count_unreadable()
    reconstruction, predictor, accuracy, grad_norm = rows.mean(0).tolist()
    values = {"reconstruction_loss": reconstruction}
    if state.model.predictor is not None:
        values |= {"predictor_loss": predictor, "ranking_accuracy": accuracy}
    values |= {
        "grad_norm": grad_norm,
        "learning_rate": state.schedule.learning_rate(state.step - 1),
        "ema_decay": state.schedule.ema_decay(state.step - 1),
        "hard_share": num_hard / state.num_hidden,
        "epoch": state.step / state.schedule.steps_per_epoch,
        "images_per_second": len(rows) * state.config.global_batch_size / seconds,
        "data_wait": window.data_wait / seconds,
        "memory_gb": memory_gb(state.device),
        "unreadable": float(len(state.unreadable)),
    }
    state.log.metrics(state.step, values)
    ranking = f"  ranking {accuracy:.3f}" if state.model.predictor is not None else ""
    state.log.progress(
        state.step,
        f"loss {reconstruction:.4f}{ranking}  {values['images_per_second']:.0f} images/s  "
        f"data wait {100 * values['data_wait']:.0f} %  {values['memory_gb']:.1f} GB",
    )


def evaluate(state: State, num_hard: int) -> None:
    """Measure on the held-out images and draw some of them; the main process alone."""
    if state.held_out is None or not distributed.is_main():
        return
    config = state.config
    state.model.eval()
    with state.autocast():
        values = evaluate_losses(
            state.trained, state.held_out, state.device, config.seed, state.say_once
        )
        if values:
            state.log.metrics(state.step, {f"held_out/{n}": v for n, v in values.items()})
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            state.log.info(f"step {state.step}, held out: {numbers}")
    state.model.train()
    shown = look(state, num_hard)
    if shown is not None:
        file = state.run.figures / f"step_{state.step:08d}.png"
        with state.log.never_fail("drawing a figure"):
            draw(shown, file, f"{config.out}, step {state.step} of {state.schedule.total}")
            state.log.figure(state.step, file)


def look(state: State, num_hard: int) -> Picture | None:
    """Picture some of the held-out images as they are now, and keep that for the report.

    The main process alone; None where there is no image to look at.
    """
    if state.held_out is None or not distributed.is_main():
        return None
    config = state.config
    some = Subset(state.held_out, np.arange(min(FIGURE_IMAGES, len(state.held_out))))
    batches = evaluation_batches(some, state.image_size, config.channels, FIGURE_IMAGES)
    batch = next(iter(batches), None)
    if batch is None or not len(batch.images):
        return None
    state.model.eval()
    with state.autocast():
        share = num_hard / state.num_hidden
        shown = picture(state.trained, batch.images, batch.indices, share, seed=config.seed)
    state.model.train()
    with state.log.never_fail("keeping pictures for the report"):
        keep_moment(shown, state.run.moments, state.step)
    return shown


def probe(state: State, ongoing: OngoingProbe) -> None:
    """Probe the features on the labelled images, and keep the weights if they are the best yet."""
    began = time.perf_counter()
    state.model.eval()
    values = ongoing.measure(state.trained, state.device, state.say_once)
    state.model.train()
    seconds = time.perf_counter() - began
    state.probe_seconds += seconds
    best = values["linear"] > state.best_probe.get("linear", -1)
    if best:
        state.best_probe = {"step": state.step} | values
        state.save_best()
    values |= {"seconds": seconds}
    state.log.metrics(state.step, {f"probe/{name}": value for name, value in values.items()})
    state.log.info(
        f"step {state.step}, probe: kNN {values['knn']:.1f} %, linear {values['linear']:.1f} %"
        f"{', the best yet' if best else ''} ({seconds:.1f} s)"
    )


@contextlib.contextmanager
def recorded(state: State) -> Iterator[None]:
    """Record when this stretch of training begins and ends, and why; leave a report behind."""
    if not distributed.is_main():
        yield
        return
    folder = state.run.folder
    with state.log.never_fail("recording the session"):
        sessions.begin(folder, state.step, state.schedule.total, state.device)
    reason, failed = sessions.FINISHED, False
    try:
        yield
    except BaseException as stopped:
        reason = _reason(stopped)
        failed = not isinstance(stopped, (Interrupted, KeyboardInterrupt))
        raise
    finally:
        with state.log.never_fail("recording the session"):
            sessions.end(folder, state.step, reason, failed)
        refresh_report(state)


def refresh_report(state: State) -> None:
    """Write the report as of now."""
    if distributed.is_main():
        with state.log.never_fail("writing the report"):
            write_report(state.run.folder)


def _reason(stopped: BaseException) -> str:
    """Why a run ended early, in a line."""
    if isinstance(stopped, Interrupted):
        return f"by {signal.Signals(stopped.signal_number).name}, saved"
    if isinstance(stopped, KeyboardInterrupt):
        return "at once, by Ctrl-C"
    text = one_line(stopped)
    return text if isinstance(stopped, UserError) else f"{type(stopped).__name__}: {text}"


def _stop_not_finite(state: State, window: Window, row: int) -> None:
    """Save the batch for a replay and say where it and the last good weights are.

    The state then stands at that step, so that line, files and report give the same number.
    """
    step = window.steps[row]
    state.step += row + 1 - len(window.steps)
    file = (
        state.run.folder / f"not_finite_step_{state.step:08d}_rank_{distributed.rank()}.safetensors"
    )
    tensors = {
        "images": step.batch.images, "indices": step.batch.indices, "losses": step.losses,
        "visible_ids": step.visible_ids, "hidden_ids": step.hidden_ids,
    }  # fmt: skip
    write_tensors(file, tensors, {"batch_of_step": state.step})
    judged = judge_checkpoints(
        list_checkpoints(state.run.checkpoints), read_lines(state.run.folder / "metrics.jsonl")
    )
    raise UserError(
        f"the loss is not finite at step {state.step}; {judged}; its batch: {file}; "
        f"{advice(state.config)}"
    )

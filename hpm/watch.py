"""What is read, measured and drawn while a run trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpm import distributed
from hpm.checkpoint import write_tensors
from hpm.data.loader import Batch, evaluation_batches
from hpm.data.sources import Subset
from hpm.errors import UserError
from hpm.evals.hardness import measure
from hpm.figures import draw, picture
from hpm.logs import memory_gb
from hpm.state import State

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
        values = measure(state.trained, state.held_out, state.device, config.seed)
        if values:
            state.log.metrics(state.step, {f"held_out/{n}": v for n, v in values.items()})
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            state.log.info(f"step {state.step}, held out: {numbers}")
        some = Subset(state.held_out, np.arange(min(FIGURE_IMAGES, len(state.held_out))))
        for batch in evaluation_batches(some, state.image_size, config.channels, FIGURE_IMAGES):
            if not len(batch.images):
                continue
            share = num_hard / state.num_hidden
            shown = picture(state.trained, batch.images, batch.indices, share, seed=config.seed)
            title = f"{config.out}, step {state.step} of {state.schedule.total}"
            draw(shown, state.run.figures / f"step_{state.step:08d}.png", title)
    state.model.train()


def probe(state: State) -> None:
    """Probe the features on the labelled images, and keep the weights if they are the best yet."""
    assert state.probe is not None
    began = time.perf_counter()
    state.model.eval()
    # One process decides for all, or rounding might part them.
    values = distributed.from_main(state.probe.measure(state.trained, state.device))
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


def _stop_not_finite(state: State, window: Window, row: int) -> None:
    """Save the batch for a replay and say where it and the last good weights are."""
    step = window.steps[row]
    number = state.step - len(window.steps) + row
    file = state.run.folder / f"not_finite_step_{number:08d}_rank_{distributed.rank()}.safetensors"
    tensors = {
        "images": step.batch.images, "indices": step.batch.indices, "losses": step.losses,
        "visible_ids": step.visible_ids, "hidden_ids": step.hidden_ids,
    }  # fmt: skip
    write_tensors(file, tensors, {"batch_of_step": number})
    raise UserError(
        f"the loss is not finite at step {number}; last good checkpoint: "
        f"{state.run.latest_checkpoint() or 'none yet'}; its batch: {file}; "
        "lower --base-lr, or train in --precision float32, in another --out"
    )

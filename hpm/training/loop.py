"""The training loop of pre-training, fine-tuning, segmentation and detection.

A training is an object with the attributes and methods of `Training`, and a function that takes one
optimiser step. `train` runs the remaining steps:

    with stop_signals() as stop:
        train(training, training.train_step, stop, [Event(every(100), training.evaluate)])

It fetches batches, takes steps, logs the losses, calls the events, saves, and stops on a signal.
The training defines what a step computes; `accumulated`, `optimizer_step` and `autocast` are
building blocks for it:

    def train_step(self, batch: Batch, step: int) -> StepResult:
        losses = []
        for part in accumulated(self.parallel, batch.parts(self.accumulate)):
            with autocast(self.device, self.precision):
                loss = self.loss(part)
            (loss / self.accumulate).backward()
            losses.append(loss.detach())
        optimizer_step(self.model, self.optimizer, self.schedule(step), self.clip_grad)
        return StepResult({"loss": torch.stack(losses).mean()})

`hpm.training.folder.TrainingFolder` locks a folder, resumes from it and saves into it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.phases import phase
from hpm.core.precision import auto_precision
from hpm.core.shards import whole
from hpm.core.signals import Interrupted, Stop
from hpm.data.unreadable import UnreadableImages
from hpm.data.workers import worker_errors
from hpm.training.log import RunLog, memory_gb

Part = TypeVar("Part")
MOST_KEPT = 20  # batches that are kept, for a replay, until the losses are known to be finite


@dataclass
class StepResult:
    """The result of an optimiser step: tensors on the device, not synchronised.

    losses: scalars by name. Their means are logged; a non-finite one stops the training.
    measures: further scalars to log, which may be NaN.
    tensors: tensors that `Training.not_finite` may save for a replay.
    """

    losses: dict[str, Tensor]
    measures: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scalars(self) -> dict[str, Tensor]:
        return self.losses | self.measures


TrainStep = Callable[[Any, int], StepResult]  # (batch, 0-based step); must not synchronise


class Event(NamedTuple):
    """Something to do between steps, such as an evaluation or a figure.

    due: whether to run after this many steps.
    run: called by all processes, which then wait for the main one.
    """

    due: Callable[[int], bool]
    run: Callable[[], object]


@runtime_checkable
class Training(Protocol):
    """What the loop needs from a training.

    step: number of optimiser steps done, which the loop increments. A resumed training starts at
        the step of its checkpoint.
    """

    step: int
    device: torch.device
    log: RunLog
    unreadable: UnreadableImages

    @property
    def sample(self) -> str:
        """What a batch is made of, for messages: `image` or `clip`."""
        ...

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole training."""
        ...

    @property
    def images_per_step(self) -> int:
        """Number of images per step over all processes."""
        ...

    @property
    def log_every(self) -> int:
        """Steps between two log entries."""
        ...

    def batches(self) -> Iterator[Any]:
        """This process's batches, from `step` to the last; see `counted_batches`."""
        ...

    def describe(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
        """(further numbers to log, such as the learning rate; text for the progress bar), given the
        means of losses and measures since the last log entry."""
        ...

    def not_finite(self, batch: Any, result: StepResult) -> UserError:
        """The error to raise for a non-finite loss. `step` is the number of the failed step."""
        ...

    def saves(self, steps_done: int) -> bool:
        """Whether to save after this many steps. The loop also saves when it is stopped."""
        ...

    def save(self) -> None:
        """Write a checkpoint. All processes call it."""
        ...


def train(
    training: Training, train_step: TrainStep, stop: Stop, events: Sequence[Event] = ()
) -> None:
    """Run the remaining steps.

    Events run after logging and before saving. Raises Interrupted, after saving, if any process
    received a stop signal, and UserError if a loss is not finite, too many images are unreadable or
    a loading worker fails.
    """
    with worker_errors():
        _train(training, train_step, stop, events)


def _train(training: Training, train_step: TrainStep, stop: Stop, events: Sequence[Event]) -> None:
    batches, interval = training.batches(), Interval()
    for step in range(training.step, training.total_steps):
        batch = interval.next_batch(batches)
        interval.steps.append((batch, train_step(batch, step)))
        training.step = step + 1
        if len(interval.steps) == MOST_KEPT:
            check_losses(training, interval)

        due = [event for event in events if event.due(training.step)]
        saving = training.saves(training.step)
        logging = training.step % training.log_every == 0
        stopping = stop.received > 0 and distributed.world_size() == 1
        if not (due or saving or logging or stopping):
            continue
        # Several processes agree on stopping here, where they synchronise anyway.
        received = stop.received
        news = received > 0 or training.unreadable.has_news
        news = distributed.any_process(news, training.device)
        log_losses(training, interval, news)
        stop_signal = max(distributed.gather(received)) if news else 0
        for event in due:
            event.run()
            distributed.wait_for_main()
        if saving or stop_signal:
            training.save()
        if stop_signal and training.step < training.total_steps:
            raise Interrupted(stop_signal)
        interval = Interval()


class Interval:
    """The steps since the last log entry, and their time."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, StepResult]] = []  # (batch, result) of those to be checked
        self.names: list[str] = []  # of losses and measures
        self.rows: list[Tensor] = []  # [steps names], of the others, on the CPU
        self.data_wait = 0.0  # seconds
        self.start = time.perf_counter()

    def next_batch(self, batches: Iterator[Part]) -> Part:
        """The next batch. Adds the time to load it to `data_wait`."""
        start = time.perf_counter()
        batch = next(batches)
        self.data_wait += time.perf_counter() - start
        return batch


def check_losses(training: Training, interval: Interval) -> None:
    """Fetch the losses of the steps that are to be checked, and drop their batches. Raises
    `not_finite` if one is not finite.

    The loop synchronises with the device only here and, with several processes, at a log entry
    (`any_process`).
    """
    results = [result for _, result in interval.steps]
    rows = torch.stack([torch.stack(list(result.scalars.values())) for result in results])
    rows = distributed.mean(rows).cpu()
    finite = rows[:, : len(results[0].losses)].isfinite().all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        training.step += first + 1 - len(rows)  # messages name the failed step
        raise training.not_finite(*interval.steps[first])
    interval.names = list(results[0].scalars)
    interval.rows.append(rows)
    interval.steps = []


def log_losses(training: Training, interval: Interval, news: bool = True) -> None:
    """Log the mean losses of the steps. Raises `not_finite` if one is not finite.

    news: whether any process has found unreadable images, or may have.
    """
    if interval.steps:
        check_losses(training, interval)
    rows = torch.cat(interval.rows)
    seconds = time.perf_counter() - interval.start
    training.unreadable.check(training.log.info, news)
    means = dict(zip(interval.names, rows.mean(0).tolist(), strict=True))
    more, status = training.describe(means)
    speed = {
        "images_per_second": len(rows) * training.images_per_step / seconds,
        "data_wait": interval.data_wait / seconds,
        "memory_gb": memory_gb(training.device),
        "unreadable": float(len(training.unreadable)),
    }
    training.log.metrics(training.step, means | more | speed)
    rate = speed["images_per_second"]
    left = (training.total_steps - training.step) * seconds / len(rows)
    training.log.progress(
        training.step,
        f"{status}  {rate:{'.0f' if rate >= 10 else '.2g'}} {training.sample}s/s  "
        f"data wait {100 * speed['data_wait']:.0f} %  {speed['memory_gb']:.1f} GB",
        left,
    )


def every(steps: int, total_steps: int) -> Callable[[int], bool]:
    """`Event.due` for every `steps` steps, and after the last one."""
    return lambda steps_done: steps_done % steps == 0 or steps_done == total_steps


def counted_batches(
    loader: Iterable[Part], unreadable: UnreadableImages, batch_size: int
) -> Iterator[Part]:
    """The batches of a loader, adding unreadable images to `unreadable`.

    batch_size: samples in each batch of this process. Raises UserError for a smaller batch, which
    means that no readable image was found.
    """
    for batch in loader:
        indices: Tensor = batch.indices  # type: ignore[attr-defined]
        problems: list[tuple[int, str]] = batch.unreadable  # type: ignore[attr-defined]
        if len(indices) < batch_size:
            raise UserError(f"{unreadable.source.name}: no readable image ({problems[0][1]})")
        unreadable.add(problems)
        yield batch


def accumulated(model: nn.Module, parts: Sequence[Part]) -> Iterator[Part]:
    """Iterate over the parts of a batch for gradient accumulation. Gradients are averaged over the
    processes only in the last part.

    model: as returned by `hpm.core.distributed.data_parallel`.
    """
    for number, part in enumerate(parts, 1):
        with distributed.no_gradient_sync(model, last=number == len(parts)):
            yield part


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    clip_grad: float | None = None,
) -> Tensor | None:
    """Clip the gradients to the norm `clip_grad`, update the weights, and clear the gradients.

    Args:
        learning_rate: multiplied by the `lr_scale` of parameter groups that have one.
        clip_grad: 0 clips nothing, but measures the norm; None does neither.

    Returns the gradient norm before clipping, or None.
    """
    with phase("optimiser"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        norm = None
        if clip_grad is not None:
            most = clip_grad or math.inf
            norm = whole(nn.utils.clip_grad_norm_(model.parameters(), most).detach())
        optimizer.step()
        optimizer.zero_grad()
    return norm


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context for a forward pass.

    precision: `float32`, `bfloat16`, or `auto`, see `auto_precision`.
    """
    if precision == "auto":
        precision = auto_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")

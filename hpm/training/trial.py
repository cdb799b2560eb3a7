"""Time the parts of a training on a throwaway copy of it, before it begins.

The copy is built from the same options and reads the same images as the training, by the same
functions. Nothing of it is kept, so that the training is the one that it would be without a trial.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from hpm.core import distributed, lock
from hpm.core.config import PretrainConfig
from hpm.core.phases import PhaseClock
from hpm.core.random_state import random_state_kept
from hpm.core.signals import Interrupted, Stop
from hpm.data.loader import Batch
from hpm.data.workers import num_workers
from hpm.training.build import build_run
from hpm.training.loop import Interval, StepResult, log_losses
from hpm.training.pace import Pace
from hpm.training.run import PretrainingRun
from hpm.training.schedule import Schedule, make_schedule, num_steps, steps_per_epoch

WARM_UP = 2  # steps in which PyTorch compiles and allocates memory
MOST, FEWEST = 20, 3  # steps that are timed
SHARE = 0.05  # of the time there is: what timing may take

Job = Callable[[PretrainingRun], object]


class Parts(NamedTuple):
    """What a training consists of.

    step: an optimiser step on a batch, given the number of the step and of mined patches. evaluate,
    probe: what is done between steps, with all that is drawn and written.
    """

    step: Callable[[PretrainingRun, Batch, int, int], StepResult]
    evaluate: Job
    probe: Job | None = None


class Trial:
    """A throwaway copy of a training, of which parts are timed. All processes take part.

    startup: seconds from `began` until the first steps were done, without those. rough_step:
    seconds of a step, timed once.
    """

    def __init__(self, run: PretrainingRun, parts: Parts, stop: Stop, began: float):
        self.run, self.parts, self._stop = run, parts, stop
        self._turn = run.config.mine_every  # steps of which the teacher mines in one
        # As many steps everywhere: machines may have different numbers of cores.
        self._workers = max(distributed.gather(num_workers(run.config.workers)))
        warm_up = -(-WARM_UP // self._turn) * self._turn
        self.rough_step = self._timed(warm_up, self._turn)
        spent = time.monotonic() - began - (warm_up + self._turn) * self.rough_step
        self.startup = distributed.from_main(max(0.0, spent))

    def count_within(self, seconds: float) -> int:
        """How many steps to time: MOST, or as many as fit into the time, at least FEWEST. With
        several workers, whose batches come together, two of each if there is time."""
        wanted = max(MOST, 2 * self._workers)
        count = max(FEWEST, min(wanted, int(seconds / self.rough_step) - self._workers))
        return -(-count // self._turn) * self._turn

    def step_seconds(self, count: int, again: bool = False) -> float:
        """Mean time of `count` steps on images that the trial has not seen yet, or on those of the
        last call."""
        if again:
            self.run.step -= self._before(count) + count
        return self._timed(self._before(count), count)

    def job_seconds(self, job: Job) -> float:
        """Time of an evaluation or the like, for which all processes wait."""
        start = time.monotonic()
        job(self.run)
        distributed.wait_for_main()
        return distributed.from_main(time.monotonic() - start)

    def save_seconds(self) -> float:
        """Time of a checkpoint."""

        def save(run: PretrainingRun) -> None:
            with run.saving():
                run.save()

        return self.job_seconds(save)

    def _before(self, count: int) -> int:
        """Steps before those that are timed. The first batches of all workers come together."""
        return -(-min(count, max(1, self._workers)) // self._turn) * self._turn

    def _timed(self, skipped: int, count: int) -> float:
        """Mean time of `count` steps after others, as in `hpm.training.loop.train`; that of the
        slowest process. Raises Interrupted on a stop signal."""
        run = self.run
        total = run.step + skipped + count
        run.schedule = dataclasses.replace(run.schedule, total=total)
        num_hard = run.num_hard(total // 2)  # so that the teacher runs
        batches, interval = run.batches(), Interval()
        start = 0.0
        for number in range(skipped + count):
            if number == skipped:
                start = PhaseClock(run.device).now()
            batch = interval.next_batch(batches)
            result = self.parts.step(run, batch, run.step, num_hard)
            interval.steps.append((batch, result))
            run.step += 1
            if run.step % run.log_every == 0:
                log_losses(run, interval)
                interval = Interval()
        seconds = PhaseClock(run.device).now() - start
        found = distributed.gather((seconds, self._stop.received))
        if signal := max(signal for _, signal in found):
            raise Interrupted(signal)
        return max(seconds for seconds, _ in found) / count


@contextmanager
def trial_of(
    config: PretrainConfig, device: torch.device, parts: Parts, stop: Stop
) -> Iterator[Trial]:
    """A trial of a training, in a folder beside its own, which is removed. The length of the
    training does not matter. Raises UserError as the training does."""
    began = time.monotonic()
    out = Path(config.out).resolve()  # `.` has no name
    folder = out.with_name(f".{out.name}.trial")
    # At a rate of 0 the weights stay as they are, and the losses finite.
    config = dataclasses.replace(
        config, out=str(folder), steps=config.steps or 1000, base_lr=0.0, max_hours=None
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of a trial before this one
    with random_state_kept(device):
        distributed.main_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        run = trial = None
        try:
            run = build_run(config, device, quiet=True)
            trial = Trial(run, parts, stop, began)
            yield trial
        finally:
            if run is not None:
                run.log.close()
            lock.release(folder)
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)
            if trial is not None:
                del trial.run  # the caller still has the trial
            del run
            gc.collect()  # before the training allocates as much
            if device.type == "cuda":
                torch.cuda.empty_cache()


def measure_pace(trial: Trial, seconds: float) -> Pace:
    """Time all parts of a training of so many seconds, of which a small share is spent here."""
    # In memory on some machines, not on others: all time both.
    kept = any(distributed.gather(trial.run.cache is not None))
    count = trial.count_within(SHARE * seconds / (1 + kept))
    first = trial.step_seconds(count)
    step = trial.step_seconds(count, again=True) if kept else first
    evaluation = trial.job_seconds(trial.parts.evaluate)
    if evaluation < SHARE * seconds:  # the first one imported what figures need
        evaluation = trial.job_seconds(trial.parts.evaluate)
    return Pace(
        startup=trial.startup,
        step=step,
        first_visit=max(0.0, first - step),
        evaluation=evaluation,
        probe=trial.job_seconds(trial.parts.probe) if trial.parts.probe else 0.0,
        save=trial.save_seconds(),
    )


class Timed(NamedTuple):
    """What the parts of a training take; its resolved config, for `images` images (None: a
    stream)."""

    pace: Pace
    config: PretrainConfig
    images: int | None

    @classmethod
    def of(cls, trial: Trial, pace: Pace, config: PretrainConfig) -> Timed:
        """config: of the training that the trial stands for, which knows its length."""
        resolved = dataclasses.replace(trial.run.config, steps=config.steps, epochs=config.epochs)
        return cls(pace, resolved, trial.run.images.count)

    @property
    def length(self) -> int:
        """Number of steps that --steps or --epochs asks for."""
        per_epoch = steps_per_epoch(self.config, self.config.global_batch_size, self.images)
        return num_steps(self.config.steps, self.config.epochs, per_epoch)

    def schedule_of(self, steps: int) -> Schedule:
        """The durations of this training with another number of steps."""
        return make_schedule(dataclasses.replace(self.config, steps=steps), self.images)

    def seconds(self, steps: int) -> float:
        """Time of a training of so many steps."""
        return self.pace.seconds(self.schedule_of(steps))


def time_parts(
    config: PretrainConfig, device: torch.device, parts: Parts, stop: Stop, limit: float
) -> Timed:
    """Time each part of a training. limit: of the whole training, in seconds; a small share of it
    is spent here. Raises UserError as the training does."""
    with trial_of(config, device, parts, stop) as trial:
        return Timed.of(trial, measure_pace(trial, limit), config)

"""The training loop, on a training of a few numbers."""

import json
import math
import signal
import weakref
from types import SimpleNamespace as Batch

import pytest
import torch
from torch import nn

import hpm
from hpm.core import distributed, lock
from hpm.core.phases import PhaseClock, phase
from hpm.core.signals import Interrupted, Stop
from hpm.data.sources import Source
from hpm.data.unreadable import UnreadableImages
from hpm.training.folder import TrainingFolder
from hpm.training.log import RunLog
from hpm.training.loop import (
    Event,
    StepResult,
    Training,
    accumulated,
    autocast,
    counted_batches,
    every,
    optimizer_step,
    train,
)

CPU = torch.device("cpu")


class Images(Source):
    """A source, as far as unreadable images go."""

    name = "photos"

    def __len__(self):
        return 100

    def path(self, index):
        return f"photos/{index}.png"

    def open(self, index):
        raise OSError("there are none")


class Regression:
    """A linear layer learns to add up four numbers; every random number follows from the step."""

    log_every, images_per_step, save_every = 4, 8, 3
    sample = "image"

    def __init__(self, folder, total_steps=10, **identity):
        torch.manual_seed(0)
        self.device, self.total_steps, self.step = CPU, total_steps, 0
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.unreadable = UnreadableImages(Images(), share=0.02)
        self.files = TrainingFolder(folder, "regression", {"size": (4, 1)} | identity)
        self.files.claim()
        self.step = self.files.resume(self.model, self.optimizer, self.unreadable)
        self.log = RunLog(folder, self.step, total_steps, active=True)
        self.saved, self.broken_step, self.problems = [], None, {}

    def batches(self):
        def load():
            for step in range(self.step, self.total_steps):
                inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                problems = self.problems.get(step, [])
                yield Batch(inputs=inputs, indices=torch.arange(8), unreadable=problems)

        return counted_batches(load(), self.unreadable, 8)

    def train_step(self, batch, step):
        losses = []
        for inputs in accumulated(self.model, batch.inputs.chunk(2)):
            loss = (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            (loss / 2).backward()
            losses.append(loss.detach())
        norm = optimizer_step(self.model, self.optimizer, 0.1, clip_grad=1.0)
        loss = torch.stack(losses).mean()
        if step == self.broken_step:
            loss = loss * math.nan
        measures = {"never_known": torch.tensor(math.nan)}
        return StepResult({"loss": loss, "grad_norm": norm}, measures, {"mark": torch.tensor(step)})

    def describe(self, means):
        return {"epoch": self.step / 5}, f"loss {means['loss']:.3f}"

    def not_finite(self, batch, result):
        return hpm.UserError(f"broken at step {self.step}, {int(result.tensors['mark'])}")

    def saves(self, steps_done):
        return every(self.save_every, self.total_steps)(steps_done)

    def save(self):
        self.saved.append(self.step)
        self.files.save(self.model, self.optimizer, self.step, self.unreadable)

    def run(self, stop=None, events=()):
        try:
            train(self, self.train_step, stop or Stop(), events)
        finally:
            self.log.close()
            self.files.release()
        return self


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_a_training(tmp_path):
    training = Regression(tmp_path)
    assert isinstance(training, Training)
    training.run()


def test_losses_are_logged_and_checkpoints_written_when_due(tmp_path):
    training = Regression(tmp_path, total_steps=40).run()
    assert training.step == 40 and training.saved == [*range(3, 40, 3), 40]
    lines = metrics(tmp_path)
    # Read when it is time to log, and before each checkpoint.
    assert [line["step"] for line in lines][:6] == [3, 4, 6, 8, 9, 12]
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]
    assert {
        "grad_norm",
        "epoch",
        "images_per_second",
        "data_wait",
        "memory_gb",
        "unreadable",
    } <= set(lines[0])
    assert all(math.isnan(line["never_known"]) for line in lines)
    assert "step 40/40  loss " in (tmp_path / "train.log").read_text()


def test_what_is_logged_is_the_mean_since_the_last_reading(tmp_path):
    each = Regression(tmp_path / "each", total_steps=4)
    each.log_every = 1
    each.run()
    Regression(tmp_path / "all", total_steps=4).run()
    single = {line["step"]: line["loss"] for line in metrics(tmp_path / "each")}
    first, second = metrics(tmp_path / "all")
    assert first["loss"] == pytest.approx((single[1] + single[2] + single[3]) / 3)
    assert second["loss"] == pytest.approx(single[4])


def test_events_run_at_their_steps_before_the_checkpoint(tmp_path):
    training, seen = Regression(tmp_path), []

    def event(name):
        return lambda: seen.append((name, training.step, list(training.saved)))

    events = [Event(every(5, 10), event("probe")), Event(lambda step: step == 6, event("figure"))]
    training.run(events=events)
    assert seen == [("probe", 5, [3]), ("figure", 6, [3]), ("probe", 10, [3, 6, 9])]


@pytest.mark.parametrize("stopped_at", [2, 6])
def test_stopped_and_gone_on_ends_at_the_same_bits(tmp_path, stopped_at):
    whole = Regression(tmp_path / "whole").run()
    stop = Stop()
    stopped = Regression(tmp_path / "stopped")
    take_step = stopped.train_step

    def signalled(batch, step):
        if step + 1 == stopped_at:
            stop.signal = signal.SIGUSR1
        return take_step(batch, step)

    stopped.train_step = signalled
    with pytest.raises(Interrupted) as interrupted:
        stopped.run(stop)
    assert interrupted.value.signal_number == signal.SIGUSR1
    assert stopped.saved[-1] == stopped_at
    resumed = Regression(tmp_path / "stopped")
    assert resumed.step == stopped_at
    resumed.run()
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.model.bias, whole.model.bias)
    steps = [line["step"] for line in metrics(tmp_path / "stopped")]
    assert steps == sorted(set(steps))


def test_a_signal_in_the_last_step_does_not_interrupt(tmp_path):
    stop = Stop()
    training = Regression(tmp_path)
    events = [Event(lambda step: step == 10, lambda: setattr(stop, "signal", signal.SIGTERM))]
    training.run(stop, events)
    assert training.step == 10 and training.saved[-1] == 10


def test_all_processes_stop_with_the_signal_that_one_received(tmp_path, monkeypatch):
    training = Regression(tmp_path)
    other = int(signal.SIGTERM)  # of another process; this one received nothing
    monkeypatch.setattr("hpm.training.loop.distributed.any_process", lambda *_: True)
    monkeypatch.setattr(
        "hpm.training.loop.distributed.gather",
        lambda value: [value, other] if isinstance(value, int) else [value],
    )
    with pytest.raises(Interrupted) as interrupted:
        training.run()
    assert interrupted.value.signal_number == signal.SIGTERM and training.saved == [3]


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    training = Regression(tmp_path)
    training.broken_step = 4
    with pytest.raises(hpm.UserError, match="broken at step 5, 4"):
        training.run()
    assert training.step == 5 and training.saved == [3]  # what is broken is not saved


def test_unreadable_images_are_counted_bounded_and_remembered(tmp_path):
    training = Regression(tmp_path / "few", total_steps=4)
    training.problems = {1: [(7, "broken")]}
    training.run()
    longer = Regression(tmp_path / "few", total_steps=8)
    longer.problems = {5: [(7, "broken")]}
    longer.run()
    assert [line["unreadable"] for line in metrics(tmp_path / "few")] == [1, 1, 1, 1]
    assert (tmp_path / "few" / "train.log").read_text().count("cannot read photos/7.png") == 1
    many = Regression(tmp_path / "many")
    many.problems = {1: [(index, "broken") for index in (1, 2, 3)]}
    with pytest.raises(hpm.UserError, match="3 of 100 images cannot be read"):
        many.run()


def test_another_training_in_the_folder_is_refused(tmp_path):
    Regression(tmp_path, seed=1).run()
    try:
        with pytest.raises(hpm.UserError, match="another regression: there seed is 1, here 2"):
            Regression(tmp_path, seed=2)
    finally:
        lock.release(tmp_path)


def test_batches_are_counted():
    unreadable = UnreadableImages(Images(), share=0.02)
    whole = Batch(indices=torch.arange(4), unreadable=[(3, "broken")])
    assert list(counted_batches([whole], unreadable, 4)) == [whole]
    lines = []
    unreadable.check(lines.append)
    assert lines == ["cannot read photos/3.png (broken), passed over"]
    empty = Batch(indices=torch.arange(0), unreadable=[(0, "not an image")])
    with pytest.raises(hpm.UserError, match=r"photos: no readable image \(not an image\)"):
        list(counted_batches([empty], unreadable, 4))


def test_a_step_scales_clips_and_clears():
    model = nn.Linear(3, 1, bias=False)
    groups = [{"params": model.parameters(), "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    norm = optimizer_step(model, optimizer, 0.2, clip_grad=1.0)
    assert norm.item() == pytest.approx(5)
    step = 0.1 * torch.tensor([[0.6, 0.0, 0.8]])
    torch.testing.assert_close(model.weight.detach(), before - step)
    assert model.weight.grad is None
    model.weight.grad = torch.full((1, 3), 1e3)
    assert optimizer_step(model, optimizer, 0.2) is None
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((1, 3), 1e3)
    assert optimizer_step(model, optimizer, 0.2, clip_grad=0.0).item() > 1e3
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * 1e3)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)],
)
def test_autocast_on_a_cpu(precision, dtype):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_phases_are_timed_and_in_a_trace():
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded, PhaseClock(CPU) as clock:
        for _ in range(2):
            with phase("forward"):
                torch.ones(8, 8) @ torch.ones(8, 8)
        with phase("EMA"):
            pass
    assert set(clock.seconds) == {"forward", "EMA"} and clock.seconds["forward"] > 0
    names = [event.name for event in recorded.events()]
    assert names.count("forward") == 2 and names.count("EMA") == 1
    with phase("forward"):
        pass
    assert set(clock.seconds) == {"forward", "EMA"}  # the clock has stopped


def test_few_batches_are_kept_however_rarely_losses_are_logged(tmp_path):
    training = Regression(tmp_path, total_steps=90)
    training.log_every, training.save_every = 80, 90
    step, kept, alive = training.train_step, weakref.WeakSet(), []

    def noted(batch, number):
        kept.add(batch.inputs)
        alive.append(len(kept))
        return step(batch, number)

    training.train_step = noted
    training.run()
    assert max(alive) <= 25
    first, last = metrics(tmp_path)
    often = metrics_of_a_log_of_every_step(tmp_path / "often")
    for logged, losses in ((first, often[:80]), (last, often[80:])):
        assert logged["loss"] == pytest.approx(sum(losses) / len(losses))


def metrics_of_a_log_of_every_step(folder):
    training = Regression(folder, total_steps=90)
    training.log_every = 1
    training.run()
    return [line["loss"] for line in metrics(folder)]


def test_a_loss_that_is_not_finite_stops_long_before_it_is_logged(tmp_path):
    training = Regression(tmp_path, total_steps=90)
    training.log_every, training.save_every, training.broken_step = 80, 90, 33
    with pytest.raises(hpm.UserError, match="broken at step 34, 33"):
        training.run()
    assert training.step == 34


def test_checkpoints_do_not_grow_with_the_reasons_of_unreadable_images(tmp_path):
    training = Regression(tmp_path, total_steps=4)
    training.problems = {1: [(7, "a reason with a long path, a hundred thousand times over")]}
    training.run()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert b"a reason" not in checkpoint.read_bytes()


def test_objects_pass_between_processes_only_if_there_is_news(tmp_path, monkeypatch):
    """Between a thousand, they take longer than the steps of a log entry."""
    gathered, real = [], distributed.gather

    def gather(value):
        gathered.append(value)
        return real(value)

    monkeypatch.setattr(distributed, "gather", gather)
    Regression(tmp_path / "none").run()
    assert not gathered
    training = Regression(tmp_path / "one")
    training.problems = {5: [(7, "broken")]}
    training.run()
    assert {7: "broken"} in gathered and len(gathered) == 2

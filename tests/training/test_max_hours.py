"""Trainings of a given time: some steps are timed first, which fixes the number of steps."""

import dataclasses
import weakref

import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments
from jobs import torchrun

import hpm
from hpm import pretraining
from hpm.core.config import PretrainConfig
from hpm.core.options import read_preset
from hpm.core.signals import Stop
from hpm.training import length, trial
from hpm.training.pace import Pace, steps_within
from hpm.training.schedule import make_schedule
from hpm.weights.checkpoint import load_checkpoint

TIMED = {name: value for name, value in TINY.items() if name != "steps"} | {"max_hours": 0.5}
PACE = Pace(startup=60, step=0.5, first_visit=0.25, evaluation=20, probe=30, save=5)


def final(run):
    return load_checkpoint(run.latest_checkpoint())


def assert_same(one, other):
    for name, tensor in final(one).model.items():
        assert torch.equal(tensor, final(other).model[name]), name


@pytest.fixture
def eight_steps_fit(monkeypatch):
    """The trial is run, but what it finds does not depend on the clock."""
    monkeypatch.setattr(trial, "MOST", trial.FEWEST)
    monkeypatch.setattr(length, "steps_within", lambda seconds, pace, schedule_of: 8)


@pytest.mark.parametrize("every", ["10%", "500 steps"])
@pytest.mark.parametrize("seconds", [200.0, 3600.0, 86400.0])
def test_as_many_steps_as_fit(every, seconds):
    config = PretrainConfig("photos", "run", batch_size=64, base_lr=1e-3, eval_every=every)

    def schedule_of(steps):
        return make_schedule(dataclasses.replace(config, steps=steps), num_images=6400)

    steps = steps_within(seconds, PACE, schedule_of)
    assert PACE.seconds(schedule_of(steps)) <= seconds < PACE.seconds(schedule_of(steps + 1))


def test_the_parts_of_a_training():
    config = PretrainConfig("photos", "run", batch_size=64, base_lr=1e-3, steps=250)
    config = dataclasses.replace(config, eval_every="100 steps", checkpoint_every="50%")
    schedule = make_schedule(config, num_images=6400)  # 100 steps an epoch; probes: 5 in all
    # Evaluations before the first step, after 100 and 200, and at the end; checkpoints after 125
    # and at the end.
    expected = 60 + 250 * 0.5 + 100 * 0.25 + 4 * 20 + 5 * 30 + 2 * 5
    assert PACE.seconds(schedule) == pytest.approx(expected)


def test_nothing_fits():
    config = PretrainConfig("photos", "run", batch_size=64, base_lr=1e-3)
    found = steps_within(
        70, PACE, lambda n: make_schedule(dataclasses.replace(config, steps=n), 64)
    )
    assert found == 0


def test_a_run_of_hours_is_one_of_steps(image_folder, tmp_path, eight_steps_fit):
    """To the bit, although some steps were timed before."""
    options = {"data": str(image_folder), "mine_every": 2}
    timed = hpm.pretrain(out=str(tmp_path / "timed"), **TIMED | options)
    whole = hpm.pretrain(out=str(tmp_path / "whole"), **TINY | options)
    assert_same(timed, whole)
    losses = [[line.get("reconstruction_loss") for line in run.metrics()] for run in (timed, whole)]
    assert losses[0] == losses[1]
    written = read_preset(timed.folder / "config.yaml")
    assert (written["steps"], written["max_hours"]) == (8, 0.5)
    log = (timed.folder / "train.log").read_text()
    assert "--max-hours 0.5: 8 steps, because a step takes" in log and "took" in log
    assert {path.name for path in tmp_path.iterdir()} == {"timed", "whole"}


def test_a_run_of_hours_into_the_present_folder(
    image_folder, tmp_path, monkeypatch, eight_steps_fit
):
    out = tmp_path / "here"
    out.mkdir()
    monkeypatch.chdir(out)
    hpm.pretrain(out=".", data=str(image_folder), **TIMED)
    assert (out / "backbone.safetensors").exists() and list(tmp_path.iterdir()) == [out]


def test_a_resumed_run_keeps_its_steps(image_folder, tmp_path, monkeypatch, eight_steps_fit):
    options = TIMED | {"data": str(image_folder), "out": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(**options)
    used = final(hpm.Run(tmp_path / "run")).meta["seconds"]
    monkeypatch.setattr(length, "time_parts", None)  # nothing is timed again
    with pytest.raises(hpm.UserError, match="there max_hours is 0.5, here max_hours 2; choose"):
        hpm.pretrain(**options | {"max_hours": 2})
    run = hpm.pretrain(**options)
    assert final(run).meta["step"] == 8 and final(run).meta["seconds"] > used > 0
    log = (run.folder / "train.log").read_text()
    assert "of --max-hours 0.5 were used before; the 8 steps that were fixed then are kept" in log
    whole = hpm.pretrain(**options | {"out": str(tmp_path / "whole"), "max_hours": None} | TINY)
    assert_same(run, whole)
    # Finished, it may be prolonged as any other.
    hpm.pretrain(**options | {"max_hours": None, "steps": 12})


@pytest.mark.slow
def test_the_time_is_measured(image_folder, tmp_path, monkeypatch):
    """Every part of it, of a training that does not begin."""
    monkeypatch.setattr(trial, "MOST", trial.FEWEST)
    options = {"data": str(image_folder), "out": str(tmp_path / "run"), "holdout": 4}
    config = PretrainConfig(**TIMED | options)
    parts = pretraining.training_parts(None)
    timed = trial.time_parts(config, torch.device("cpu"), parts, Stop(), 100)
    pace = timed.pace
    assert min(pace.step, pace.evaluation, pace.save) > 0
    # Differences of times, which other work on the machine may hide.
    assert min(pace.startup, pace.first_visit) >= 0 and pace.probe == 0
    assert timed.schedule_of(7).total == 7 and list(tmp_path.iterdir()) == []


def test_the_memory_of_the_trial_is_free_when_it_ends(image_folder, tmp_path):
    """Also while its caller still has its times: a training allocates as much."""
    config = PretrainConfig(data=str(image_folder), out=str(tmp_path / "run"), **TINY)
    parts, cpu = pretraining.training_parts(None), torch.device("cpu")
    with trial.trial_of(config, cpu, parts, Stop()) as timed:
        model = weakref.ref(timed.run.model)
    assert model() is None and timed.rough_step > 0


def test_mistakes(image_folder, tmp_path):
    def refused(words, *arguments, out=tmp_path / "run", **changes):
        typed = [a for a in tiny_arguments(**changes) if not a.startswith("--steps")]
        assert_refused(run_here("pretrain", image_folder, "--out", out, *typed, *arguments), words)

    refused("steps is 5 and max_hours is 1: pass only one", "--steps=5", "--max-hours=1")
    refused("epochs is 5 and max_hours is 1: pass only one", "--epochs=5", "--max-hours=1")
    refused("--max-hours is 0; it must be above 0", "--max-hours=0")
    refused("max_hours is 1e-06, but a step takes", "--max-hours=0.000001")
    assert not list(tmp_path.iterdir())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.txt").touch()
    refused("is no run folder", "--max-hours=1", out=tmp_path / "photos")


def test_a_length_replaces_that_of_a_preset():
    from hpm.core.options import lay_over

    assert lay_over({"steps": 5, "seed": 1}, {"max_hours": 2}) == {"seed": 1, "max_hours": 2}
    assert lay_over({"max_hours": 2, "seed": 1}, {"epochs": 3}) == {"seed": 1, "epochs": 3}
    # Of a run's own config: the steps are fixed.
    assert lay_over({"max_hours": 2, "steps": 9}, {}) == {"max_hours": 2, "steps": 9}


@pytest.mark.slow
def test_all_processes_agree(image_folder, tmp_path):
    arguments = [a for a in tiny_arguments() if not a.startswith("--steps")]
    command = ["pretrain", image_folder, "--out", tmp_path / "run", "--max-hours=0.02"]
    result = torchrun("-m", "hpm", *command, *arguments)
    assert result.returncode == 0, result.stderr
    run = hpm.Run(tmp_path / "run")
    assert final(run).meta["step"] == read_preset(run.folder / "config.yaml")["steps"] > 0
    assert result.stderr.count("timing some steps first") == 1

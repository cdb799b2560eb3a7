"""Limits in time, constant learning rates, and runs that are prolonged."""

import functools
import itertools
import signal

import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments

import hpm
from hpm import pretraining
from hpm.core.durations import seconds, time_text
from hpm.core.files import write_tensors
from hpm.core.signals import stop_signals
from hpm.training.optim import constant_learning_rate
from hpm.weights.checkpoint import load_checkpoint
from hpm.weights.run_folder import RunFolder

# Nothing here depends on the length of the run, so that a prolonged run equals a long one.
CONSTANT = TINY | {
    "schedule": "constant",
    "cooldown": "2 steps",
    "warmup": "1 step",
    "ema_horizon_end": "4 steps",
    "ema_ramp": "4 steps",
    "mask": "random",
    "predictor_loss": "none",
    "hard_share_start": None,
    "log_every": 1,
}


def final(run):
    return load_checkpoint(run.latest_checkpoint())


def assert_same(one, other):
    for name, tensor in final(one).model.items():
        assert torch.equal(tensor, final(other).model[name]), name


@pytest.mark.parametrize(
    ("text", "expected"), [("4h", 14400), ("90m", 5400), ("1d12h", 129600), ("1h 30m 5s", 5405)]
)
def test_times(text, expected):
    assert seconds(text) == expected


def test_a_cooldown_belongs_to_the_constant_rate(image_folder, tmp_path):
    with pytest.raises(hpm.UserError, match="cooldown is 20%, but schedule is cosine: pass --sch"):
        hpm.pretrain(str(image_folder), str(tmp_path / "run"), **TINY | {"cooldown": "20%"})


@pytest.mark.parametrize("text", ["", "4", "h", "4 hours", "30m1h", "-1h", "1.5h"])
def test_no_times(text):
    with pytest.raises(hpm.UserError, match="is not a time: write '4h', '90m' or '1d12h'"):
        seconds(text)


@pytest.mark.parametrize(
    ("duration", "text"),
    [(5, "5 s"), (61, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_times_in_words(duration, text):
    assert time_text(duration) == text


def test_stopped_when_the_time_is_up(image_folder, tmp_path, monkeypatch):
    """As on SIGTERM; the same command goes on to the same weights."""
    options = TINY | {"data": str(image_folder), "log_every": 1, "stop_after": "5s"}
    ticks = itertools.count()
    with monkeypatch.context() as patch:
        ticking = functools.partial(stop_signals, clock=lambda: next(ticks))
        patch.setattr(pretraining, "stop_signals", ticking)
        with pytest.raises(hpm.Interrupted) as stopped:
            hpm.pretrain(out=str(tmp_path / "run"), **options)
    assert stopped.value.signal_number == signal.SIGTERM
    assert 0 < final(hpm.Run(tmp_path / "run")).meta["step"] < 8
    with monkeypatch.context() as patch:
        standing = functools.partial(stop_signals, clock=lambda: 0)
        patch.setattr(pretraining, "stop_signals", standing)
        resumed = hpm.pretrain(out=str(tmp_path / "run"), **options)
    whole = hpm.pretrain(out=str(tmp_path / "whole"), **options | {"stop_after": None})
    assert_same(resumed, whole)
    assert " left" in (whole.folder / "train.log").read_text()


def test_constant_learning_rate():
    rates = [constant_learning_rate(step, 10, 2, 4, 1.0) for step in range(11)]
    assert rates == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("stopped_at", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_prolonged_constant_run_equals_a_long_one(
    stopped_at, image_folder, tmp_path, monkeypatch
):
    """Whether it was finished, and then goes on from before its cooldown, or not."""
    options = CONSTANT | {"data": str(image_folder)}
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, stopped_at)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(out=out, **options)
    prolonged = hpm.pretrain(out=out, **options | {"steps": 12})
    whole = hpm.pretrain(out=str(tmp_path / "whole"), **options | {"steps": 12})
    assert_same(prolonged, whole)
    steps = [line["step"] for line in prolonged.metrics()]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    aside = list(prolonged.checkpoints.glob("cooled_step_00000008.safetensors"))
    assert len(aside) == (stopped_at == 8)


def test_a_constant_run_is_prolonged_twice(image_folder, tmp_path, monkeypatch):
    """The second time, it goes on from where it was stopped, not from before its first cooldown."""
    options = CONSTANT | {"data": str(image_folder), "checkpoint_every": "2 steps"}
    out = str(tmp_path / "run")
    run = hpm.pretrain(out=out, **options)
    assert run.before_cooldown.exists() and (run.checkpoints / "step_00000006.safetensors").exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(out=out, **options | {"steps": 20})
    assert not run.before_cooldown.exists()
    hpm.pretrain(out=out, **options | {"steps": 24})
    assert not (run.checkpoints / "cooled_step_00000010.safetensors").exists()
    steps = [line["step"] for line in run.metrics()]
    assert steps == sorted(set(steps)) and steps[-1] == 24


@pytest.mark.parametrize("suffix", [".safetensors", ".sharded"])
def test_a_second_cooldown_replaces_the_first_one(suffix, tmp_path):
    """Where both end at the same step. A folder cannot be renamed to one that holds something."""
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    write_tensors(run.before_cooldown, {}, {"step": 6})
    for name in ("cooled_step_00000008", "step_00000008"):
        path = run.checkpoints / f"{name}{suffix}"
        if suffix == ".sharded":
            path.mkdir()
            path /= "shard"
        path.write_text(name)
    run.set_aside_cooldown()
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == [f"cooled_step_00000008{suffix}", "step_00000006.safetensors"]
    aside = run.checkpoints / names[0]
    assert (aside / "shard" if aside.is_dir() else aside).read_text() == "step_00000008"


def test_a_finished_cosine_run_warms_up_again(image_folder, tmp_path, monkeypatch):
    options = TINY | {"data": str(image_folder), "log_every": 1, "warmup": "2 steps"}
    out = str(tmp_path / "run")
    run = hpm.pretrain(out=out, **options)
    backbone = run.backbone.read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(out=out, **options | {"steps": 16})
    run = hpm.pretrain(out=out, **options | {"steps": 16})  # resumes within the second part
    rates = {line["step"]: line["learning_rate"] for line in run.metrics() if "grad_norm" in line}
    for step in range(1, 9):  # the second part is the first one again
        assert rates[8 + step] == pytest.approx(rates[step])
    assert run.backbone.read_bytes() != backbone
    assert "prolonged to 16 steps" in (run.folder / "train.log").read_text()


def test_runs_that_cannot_be_prolonged(finished_run, image_folder, tmp_path, monkeypatch):
    def refused(folder, words, **changes):
        arguments = tiny_arguments(**changes)
        result = run_here("pretrain", image_folder, "--out", folder, *arguments)
        assert_refused(result, words)

    refused(finished_run.folder, "there steps is 8, here 4", steps=4, holdout=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(str(image_folder), tmp_path / "run", **TINY)
    refused(tmp_path / "run", "there steps is 8, here 12", steps=12)
    refused(tmp_path / "other", "'soon' is not a time", stop_after="soon")

"""A training whose loss is not finite: what is kept, which checkpoint is good, what is advised."""

import math
from pathlib import Path

import pytest
from helpers import TINY
from safetensors.torch import load_file

import hpm
from hpm.core.config import PretrainConfig
from hpm.training.not_finite import advice, judge_checkpoints
from hpm.training.run import PretrainingRun
from hpm.training.sessions import read_sessions


def readings(*losses, every=10):
    return [{"step": every * n, "reconstruction_loss": x} for n, x in enumerate(losses, 1)]


def judged(steps, metrics):
    return judge_checkpoints([Path(f"step_{step:08d}.safetensors") for step in steps], metrics)


def test_a_checkpoint_is_good_where_its_loss_was_near_the_ones_before():
    falling = readings(1.0, 0.8, 0.7, 0.6, 0.55)
    assert judged([30, 50], falling) == "last good checkpoint: step_00000050.safetensors"
    exploding = readings(1.0, 0.8, 0.7, 0.6, 55.0)
    text = judged([30, 50], exploding)
    assert text.startswith("last good checkpoint: step_00000030.safetensors (")
    assert "step 50" in text and "55" in text
    text = judged([50], exploding)
    assert text.startswith("no checkpoint is good") and "55" in text
    # What came after the checkpoint says nothing about it.
    assert judged([40], exploding) == "last good checkpoint: step_00000040.safetensors"
    assert judged([], falling) == "there is no checkpoint yet"


def test_the_predictors_loss_counts_as_well():
    metrics = readings(1.0, 0.9, 0.8)
    for line, loss in zip(metrics, (0.69, 0.6, 40.0), strict=True):
        line["predictor_loss"] = loss
    assert "step_00000020" in judged([20, 30], metrics)


@pytest.mark.parametrize(
    ("options", "said", "not_said"),
    [
        ({"precision": "bfloat16", "base_lr": 0.01}, ["--base-lr (it is 0.01)", "float32"], []),
        ({"precision": "float32", "base_lr": 0.01}, ["--base-lr (it is 0.01)"], ["float32"]),
        ({"precision": "float32", "base_lr": 0.0}, ["look at the images"], ["--base-lr"]),
    ],
)
def test_only_what_is_not_already_so_is_advised(options, said, not_said):
    text = advice(PretrainConfig("photos", "out", **options))
    assert all(word in text for word in said)
    assert not any(word in text for word in not_said)


def test_a_loss_that_is_not_finite(image_folder, tmp_path, monkeypatch):
    """The sixth step, in the line, in the file of its batch and in the report."""
    to_device = PretrainingRun.to_device
    monkeypatch.setattr(
        PretrainingRun,
        "to_device",
        lambda run, images: to_device(run, images) * (math.nan if run.step == 5 else 1),
    )
    with pytest.raises(hpm.UserError) as stopped:
        hpm.pretrain(data=str(image_folder), out=str(tmp_path / "run"), **TINY)
    line = str(stopped.value)
    assert "not finite at step 6;" in line and "step_00000004" in line and "float32" not in line
    (saved,) = (tmp_path / "run").glob("not_finite_step_00000006_rank_0.safetensors")
    batch = load_file(saved)
    assert batch["images"].shape == (8, 3, 16, 16) and batch["hidden_ids"].shape == (8, 12)
    run = hpm.Run(tmp_path / "run")
    assert run.latest_checkpoint().name == "step_00000004.safetensors"
    state = load_file(run.latest_checkpoint())
    assert all(tensor.isfinite().all() for tensor in state.values())
    (session,) = read_sessions(run.folder)
    assert session.failed and session.last_step == 6
    report = run.report.read_text()
    assert "Step 6 of 8" in report and "state failed" in report
    assert "Failed at step 6: the loss is not" in report

"""A loading worker that is killed, or that hangs, is one line."""

import contextlib
import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.core import distributed
from hpm.data import workers
from hpm.data.loader import EvaluationViews, TrainingViews, training_loader
from hpm.data.sources import open_source
from hpm.training.run import PretrainingRun
from hpm.weights.checkpoint import load_checkpoint


def kill_one():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_a_worker_that_is_killed(image_folder, tmp_path, monkeypatch):
    """While the run computes, not while it waits: PyTorch tells by a signal handler."""
    out, to_device = tmp_path / "run", PretrainingRun.to_device

    def killing(run, images):
        if run.step == 5:
            kill_one()
            for _ in range(200):  # until the signal is here
                time.sleep(0.01)
        return to_device(run, images)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingRun, "to_device", killing)
        command = ("pretrain", image_folder, "--out", out, *tiny_arguments(workers=1))
        refused = run_here(*command)
    assert_refused(refused, "a loading worker ended (DataLoader worker (pid", "--workers")
    assert "same command resumes" in refused.stderr
    run = hpm.pretrain(str(image_folder), str(out), **TINY)
    assert "resuming from" in (out / "train.log").read_text()
    assert load_checkpoint(run.latest_checkpoint()).meta["step"] == 8


class Hanging(EvaluationViews):
    def __call__(self, source, key):
        if key[1] == 1:
            signal.pause()
        return super().__call__(source, key)


@pytest.mark.slow
def test_a_file_system_that_stalls(image_folder, monkeypatch):
    """For longer than processes wait for each other."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    source, before = open_source(str(image_folder)).train, set(multiprocessing.active_children())
    batches = iter(training_loader(source, Hanging((8, 8), 3), [[(0, 0)], [(0, 1)]], 1, False))
    next(batches)
    with pytest.raises(hpm.UserError, match=r"nothing for 2 seconds: .* does not answer") as caught:
        next(batches)
    assert not re.search(r"\n", str(caught.value))
    for worker in set(multiprocessing.active_children()) - before:
        with contextlib.suppress(RuntimeError):  # PyTorch's, wherever the program is by then
            worker.kill()
            worker.join()


def test_workers_that_are_no_forks(image_folder, monkeypatch):
    """As on macOS: what they need is sent to them, and their views are the same."""
    source = open_source(str(image_folder)).train
    make_view = TrainingViews((8, 8), 3, 0, (0.2, 1.0), True, 1)
    keys = [[(0, 0), (0, 1)], [(1, 0), (1, 5)]]
    forked = list(training_loader(source, make_view, keys, 1, False))
    monkeypatch.setattr(workers, "FORKS", False)
    spawned = list(training_loader(source, make_view, keys, 1, False))
    for one, other in zip(forked, spawned, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)

"""The clock of the machine steps back, again and again: nothing that trains asks it for anything
but the text of a date."""

import itertools
import math
import os
import time

import pytest
from helpers import TINY, stop_after

import hpm
from hpm.training.sessions import read_sessions
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint


@pytest.fixture
def stepping_back(monkeypatch):
    """Each time that it is asked, it is an hour earlier."""
    hours = itertools.count()
    localtime, strftime, now = time.localtime, time.strftime, time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600.0 * next(hours))
    monkeypatch.setattr(time, "strftime", lambda form: strftime(form, localtime(time.time())))
    return hours


def test_a_clock_that_steps_back(image_folder, tmp_path, monkeypatch, stepping_back):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(str(image_folder), str(out), **TINY | {"steps": 12})
    older, newer = list_checkpoints(out / "checkpoints")
    os.utime(older, (4e9, 4e9))  # written later than the next one, by the clock
    os.utime(newer, (1e9, 1e9))
    run = hpm.pretrain(str(image_folder), str(out), stop_after="1h", **TINY | {"steps": 12})
    assert f"resuming from {newer}, step 8" in (out / "train.log").read_text()
    assert load_checkpoint(run.latest_checkpoint()).meta["step"] == 12
    for line in run.metrics():
        for name in ("images_per_second", "data_wait"):
            assert name not in line or (math.isfinite(line[name]) and line[name] >= 0)
    first, second = read_sessions(out)
    assert second.began < first.began and second.ended < second.began  # so it was asked
    assert second.reason == "finished" and run.report.exists()
    assert next(stepping_back) > 10

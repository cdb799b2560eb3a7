"""Thousands of epochs that are as long as a step: nothing is kept of an epoch that is over."""

import re
from pathlib import Path

import pytest
from helpers import TINY, write_images

import hpm
from hpm.training.run import PretrainingRun

EPOCHS = 2000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_thousands_of_small_epochs(workers, tmp_path, monkeypatch):
    images, found = write_images(tmp_path / "images", classes=1, per_class=8), {}
    seen, to_device = set(), PretrainingRun.to_device

    def measured(run, views):
        text = Path("/proc/self/status").read_text()
        found[run.step] = int(re.search(r"VmRSS:\s*(\d+)", text)[1]) / 1024
        seen.add(views.numpy().tobytes())
        return to_device(run, views)

    monkeypatch.setattr(PretrainingRun, "to_device", measured)
    del (options := TINY | {"epochs": EPOCHS, "workers": workers, "log_every": 100})["steps"]
    options |= {"checkpoint_every": "50%", "warmup": "10 epochs"}
    run = hpm.pretrain(str(images), str(tmp_path / "run"), **options)
    assert run.metrics()[-1]["epoch"] == EPOCHS == len(found)
    assert len(seen) == EPOCHS  # each has its own order, crops and flips
    kept = sum(map(len, seen)) / 2**20 / 2  # by this test, in the second half
    assert found[EPOCHS - 1] - found[EPOCHS // 2] < kept + 20

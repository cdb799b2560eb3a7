"""A network file system may fail for a moment: that is no reason to leave an image out, or to lose
a checkpoint."""

import builtins
import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image
from safetensors import SafetensorError

import hpm
from hpm.core import files, retries
from hpm.core.files import read_tensors, write_tensors
from hpm.data.loader import Views, training_views
from hpm.data.sources import open_source

STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)


def failing(call, error, times, calls):
    """A call that fails some times."""

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return call(*arguments, **options)

    return fail


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (STALE, 3),
        (OSError(errno.EIO, "Input/output error"), 3),
        (SafetensorError("I/O error: Stale file handle (os error 116)"), 3),
        (OSError(errno.ENOENT, "No such file"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (ValueError("something else"), 1),
    ],
)
def test_what_is_tried_again(error, attempts):
    calls = []
    with pytest.raises(type(error)):
        retries.retried(failing(lambda: 1, error, 9, calls))
    assert len(calls) == attempts
    calls.clear()
    if attempts > 1:
        assert retries.retried(failing(lambda: 1, error, 2, calls)) == 1


@pytest.mark.parametrize(("times", "readable"), [(2, True), (99, False)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy", "a.tif"])
def test_an_image_that_is_stale_for_a_moment(name, times, readable, tmp_path, monkeypatch):

    pixels = np.zeros((20, 20, 3), np.uint8)
    save = (
        np.save if name.endswith("npy") else lambda file, array: Image.fromarray(array).save(file)
    )
    save(tmp_path / name, pixels)
    source = open_source(str(tmp_path)).train
    views = Views(
        source, training_views(source, (16, 16), 3, 0, (0.2, 1.0), True, 4), stand_in=False
    )
    calls, opened = [], builtins.open

    def stale(file, *arguments, **options):
        if not str(file).endswith(name):
            return opened(file, *arguments, **options)
        return failing(opened, STALE, times, calls)(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", stale)
    monkeypatch.setattr(io, "open", stale)
    sample = views[0, 0]
    assert (sample.view is not None) == readable and len(calls) >= 3
    assert readable or "tale file handle" in sample.unreadable[0][1]


def test_a_checkpoint_on_a_stale_file_system(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "a.safetensors"
    monkeypatch.setattr(files.os, "replace", failing(os.replace, STALE, 2, calls))
    write_tensors(path, {"x": torch.ones(3)}, {})
    assert len(calls) == 3 and read_tensors(path)[0]["x"].sum() == 3
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_system_that_keeps_failing_ends_the_run(image_folder, tmp_path, monkeypatch):
    """In one line; what was saved before is there, and the same command goes on from it."""
    replace, out = os.replace, tmp_path / "run"

    def stale(source, target):
        if Path(target).name == "step_00000008.safetensors":
            raise STALE
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", stale)
        with pytest.raises(hpm.UserError, match="step_00000008.* could not be written: stale file"):
            hpm.pretrain(str(image_folder), str(out), **TINY)
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["step_00000004.safetensors"]
    assert hpm.pretrain(str(image_folder), str(out), **TINY).backbone.exists()

"""A run on a file system that really fails and stalls, by FUSE. What is patched elsewhere comes from
the system here."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
from faulty import faulty  # noqa: F401
from helpers import TINY, assert_refused, run_here, tiny_arguments
from jobs import Job, hpm_on

import hpm
from hpm.core import distributed, retries
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = {"keep_checkpoints": 9}
ERRORS = [errno.ESTALE, errno.EIO]


@pytest.fixture
def images(faulty, image_folder):  # noqa: F811
    return shutil.copytree(image_folder, faulty.below / "images") and faulty.path / "images"


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0.01, 0.01))


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return hpm.pretrain(str(image_folder), str(out), **TINY | OPTIONS)


def weights(run):
    return load_checkpoint(hpm.Run(run).latest_checkpoint()).model


def assert_equal(one, two):
    one, two = weights(one), weights(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def command(images, out, **changes):
    return ("pretrain", images, "--out", out, *tiny_arguments(**OPTIONS | changes))


@pytest.mark.parametrize("operation", ["open", "read"])
@pytest.mark.parametrize("error", ERRORS)
def test_images_that_fail_for_a_moment(error, operation, faulty, images, whole, tmp_path, brief):  # noqa: F811
    faulty.fails("*/01?.png", operation, error=error, times=2)
    result = run_here(*command(images, tmp_path / "run"))
    assert result.returncode == 0 and "cannot be read" not in result.stderr, result.stderr
    assert faulty.met == 2
    assert_equal(whole.folder, tmp_path / "run")


def test_images_that_keep_failing(faulty, images, tmp_path, brief):  # noqa: F811
    faulty.fails("*/class_0/*.png", "open", error=errno.EIO)
    result = run_here(*command(images, tmp_path / "run", max_unreadable=0.9))
    assert result.returncode == 0 and "nput/output error" in result.stderr, result.stderr
    result = run_here(*command(images, tmp_path / "other", max_unreadable=0.01))
    assert_refused(result, "images cannot be read, more than max_unreadable")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename"])
def test_a_checkpoint(operation, error, faulty, image_folder, whole, brief):  # noqa: F811
    """Twice, it does not come through for a moment; then the file system keeps failing."""
    out = faulty.path / "run"
    name = "*step_00000004*"
    faulty.fails(name, operation, error=error, times=2)
    watched = {"times": 0}

    def then():
        while not (faulty.below / "run/checkpoints/step_00000004.safetensors").exists():
            time.sleep(0.001)
        watched["times"] = faulty.met
        faulty.fails("*step_00000008*", operation, error=error)

    watcher = threading.Thread(target=then)
    watcher.start()
    result = run_here(*command(image_folder, out))
    watcher.join()
    assert_refused(result, "step_00000008.safetensors could not be written")
    assert watched["times"] == 2
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["step_00000004.safetensors"]
    faulty.works()
    assert run_here(*command(image_folder, out)).returncode == 0
    assert_equal(whole.folder, out)

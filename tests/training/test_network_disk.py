"""A run on a file system that really fails and stalls, by FUSE. What is patched elsewhere comes
from the system here."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from datetime import timedelta

import pytest
import torch
from faulty import faulty  # noqa: F401
from helpers import TINY, assert_refused, run_here, tiny_arguments
from jobs import Job, hpm_on

import hpm
from hpm.core import distributed, lock, retries
from hpm.data import workers
from hpm.training.run import PretrainingRun
from hpm.weights.checkpoint import load_checkpoint

OPTIONS = {"keep_checkpoints": 9}
EVERYTHING = ("getattr", "readdir", "open", "create", "read", "write", "fsync", "rename", "unlink")


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


@pytest.mark.parametrize(("operation", "error"), [("open", errno.ESTALE), ("read", errno.EIO)])
def test_images_that_fail_for_a_moment(operation, error, faulty, images, whole, tmp_path, brief):  # noqa: F811
    faulty.fails("*/01?.png", operation, error=error, times=2)
    result = run_here(*command(images, tmp_path / "run"))
    assert result.returncode == 0 and "cannot be read" not in result.stderr, result.stderr
    assert faulty.met == 2
    assert_equal(whole.folder, tmp_path / "run")


@pytest.mark.slow
def test_images_that_keep_failing(faulty, images, tmp_path, brief):  # noqa: F811
    faulty.fails("*/class_0/*.png", "open", error=errno.EIO)
    result = run_here(*command(images, tmp_path / "run", max_unreadable=0.9))
    assert result.returncode == 0 and "nput/output error" in result.stderr, result.stderr
    result = run_here(*command(images, tmp_path / "other", max_unreadable=0.01))
    assert_refused(result, "images cannot be read, more than max_unreadable")


@contextlib.contextmanager
def before_checkpoints(**faults):
    """Do something before the checkpoints of some steps are written: `step_4=call`."""
    save = PretrainingRun.save

    def changed(run):
        faults.get(f"step_{run.step}", lambda: None)()
        save(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingRun, "save", changed)
        yield


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        pytest.param("create", errno.ESTALE, marks=pytest.mark.slow),
        ("write", errno.EIO),
        pytest.param("fsync", errno.EIO, marks=pytest.mark.slow),
        pytest.param("rename", errno.ESTALE, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint(operation, error, faulty, image_folder, whole, brief):  # noqa: F811
    """One comes through at the second attempt or so; then the file system keeps failing."""
    out, met = faulty.path / "run", []
    place = "*/checkpoints/*"

    def fail_for_ever():
        met.append(faulty.met)
        faulty.fails(place, operation, error=error)

    with before_checkpoints(
        step_4=lambda: faulty.fails(place, operation, error=error, times=2), step_8=fail_for_ever
    ):
        result = run_here(*command(image_folder, out))
    assert_refused(result, "step_00000008.safetensors could not be written", os.strerror(error)[1:])
    assert met == [2] and faulty.met >= 3
    faulty.works()
    kept = {file.name for file in (out / "checkpoints").iterdir()}
    assert "step_00000004.safetensors" in kept and "step_00000008.safetensors" not in kept
    result = run_here(*command(image_folder, out))
    assert result.returncode == 0 and "step_00000004.safetensors, step 4" in result.stderr
    kept = sorted(file.name for file in (out / "checkpoints").iterdir())
    assert kept == ["step_00000004.safetensors", "step_00000008.safetensors"]
    assert_equal(whole.folder, out)


@pytest.mark.slow
def test_a_sharded_checkpoint(faulty, image_folder, whole, tmp_path):  # noqa: F811
    """Two processes write it while training goes on."""
    out, options = faulty.path / "run", {"shard": True, "steps": 16}
    faulty.fails("*/checkpoints/*step_00000008*", "rename", error=errno.EIO)
    refused = hpm_on(2, *command(image_folder, out, **options))
    assert refused.returncode == 2 and "nput/output error" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    faulty.works()
    done = hpm_on(2, *command(image_folder, out, **options))
    assert done.returncode == 0 and ", step 4" in done.stderr, done.stderr
    assert hpm_on(2, *command(image_folder, tmp_path / "whole", **options)).returncode == 0
    assert_equal(tmp_path / "whole", out)


def test_a_run_folder_that_fails_altogether(faulty, image_folder, brief):  # noqa: F811
    out = faulty.path / "run"
    with before_checkpoints(step_8=lambda: faulty.fails("*", *EVERYTHING, error=errno.EIO)):
        result = run_here(*command(image_folder, out))
    assert_refused(result, "step_00000008.safetensors could not be written: input/output error")
    faulty.works()
    assert run_here(*command(image_folder, out)).returncode == 0


def test_a_file_system_that_is_gone(faulty, images, brief):  # noqa: F811
    """As when its server has died: the transport endpoint is not connected."""
    out = faulty.path / "run"
    with before_checkpoints(step_4=faulty.kill):
        result = run_here(*command(images, out))
    assert_refused(result, "step_00000004.safetensors could not be written: transport endpoint")


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["open", "read"])
def test_images_that_stall(operation, faulty, images, tmp_path, monkeypatch):  # noqa: F811
    """Two workers wait inside of the file system. FUSE lets nobody kill them before it answers."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=3))
    before = set(multiprocessing.active_children())
    arguments = command(images, tmp_path / "run", workers=2, steps=40, cache="false")
    with before_checkpoints(step_4=lambda: faulty.stalls("*.png", operation)):
        result = run_here(*arguments)
    assert_refused(result, "nothing for 3 seconds:", "does not answer")
    waiting = set(multiprocessing.active_children()) - before
    assert faulty.met and len(waiting) == 2
    workers._kill_workers()  # as at exit
    faulty.works()
    for worker in waiting:
        worker.join(20)
        assert not worker.is_alive()
    result = run_here(*arguments)
    assert result.returncode == 0 and "resuming from" in result.stderr


@pytest.mark.slow
def test_a_checkpoint_that_stalls(faulty, image_folder, whole):  # noqa: F811
    """The run waits, and a signal is heeded when the file system is back."""
    out = faulty.path / "run"
    faulty.stalls("*/checkpoints/*", "create")
    job = Job("-m", "hpm", *command(image_folder, out))
    try:
        job.wait_until(lambda: faulty.met > 0)
        os.kill(job.process.pid, signal.SIGTERM)
        time.sleep(0.5)  # it would have ended
        assert job.process.poll() is None
        faulty.works()
        assert "stopped and saved" in job.errors()
        assert job.process.returncode == 128 + signal.SIGTERM and job.all_gone()
    finally:
        job.end()
    assert run_here(*command(image_folder, out)).returncode == 0
    assert_equal(whole.folder, out)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_no_locks(error, faulty, image_folder):  # noqa: F811
    faulty.fails("*", "flock", error=error)
    result = run_here(*command(image_folder, faulty.path / "run"))
    assert result.returncode == 0
    assert result.stderr.count(f"has no locks ({os.strerror(error).lower()})") == 1, result.stderr


def test_a_lock_that_the_server_holds(faulty, image_folder):  # noqa: F811
    """Another machine's: this one knows it from the server only."""
    (faulty.below / "run").mkdir()
    with open(faulty.below / "run" / lock.FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run_here(*command(image_folder, faulty.path / "run"))
    assert_refused(result, "is in use by another run")

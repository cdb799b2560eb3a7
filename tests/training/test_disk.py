"""A disk that is full, or that can only be read from then on, when a checkpoint is written."""

import contextlib
import errno
import os
import subprocess

import pytest
import torch
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.training.log import RunLog
from hpm.training.run import PretrainingRun
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = TINY | {"keep_checkpoints": 9}


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    return hpm.pretrain(str(image_folder), str(tmp_path_factory.mktemp("whole")), **OPTIONS)


@pytest.fixture
def disk(tmp_path):
    """A folder that is a file system of 64 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()

    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", "--recursive", str(folder)], check=True)


@contextlib.contextmanager
def at_second_checkpoint(do):
    """Do something to the disk before the checkpoint of step 8 is written."""
    save = PretrainingRun.save

    def changed(run):
        if run.step == 8:
            do()
        save(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingRun, "save", changed)
        yield


def goes_on(command, whole, out):
    """The same command, when the disk is as it was, ends with the same weights."""
    result = run_here(*command)
    assert result.returncode == 0 and "step_00000004.safetensors, step 4" in result.stderr
    expected, found = (load_checkpoint(hpm.Run(r).latest_checkpoint()) for r in (whole.folder, out))
    for name, tensor in expected.model.items():
        assert torch.equal(tensor, found.model[name]), name


def test_a_log_that_cannot_be_closed_hides_no_error(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, 0, 8, active=True)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._tensorboard, "close", full)
    log.close()
    assert "warning: logging failed ([Errno 28] No space left" in capsys.readouterr().err


def test_a_disk_that_is_full(disk, whole, image_folder):
    out = disk / "run"
    command = ("pretrain", image_folder, "--out", out, *tiny_arguments(keep_checkpoints=9))

    def fill():
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        # Room for half of a checkpoint: it is cut off while it is written.
        size = list_checkpoints(out / "checkpoints")[0].stat().st_size
        (disk / "other").write_bytes(bytes(free - size // 2))

    with at_second_checkpoint(fill):
        result = run_here(*command)
    assert_refused(result, "step_00000008.safetensors could not be written: no space left")
    (kept,) = (out / "checkpoints").iterdir()
    assert load_checkpoint(kept).meta["step"] == 4
    (disk / "other").unlink()
    goes_on(command, whole, out)


def test_a_folder_that_can_only_be_read(disk, whole, image_folder):
    """The system does not make a whole file system so while files are open, but this folder."""
    out = disk / "run"
    command = ("pretrain", image_folder, "--out", out, *tiny_arguments(keep_checkpoints=9))
    folder = str(out / "checkpoints")

    def make_read_only():
        for options in (["--bind", folder], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, folder], check=True)

    said = "step_00000008.safetensors could not be written: read-only file system"
    with at_second_checkpoint(make_read_only):
        assert_refused(run_here(*command), said)
    assert_refused(run_here(*command), said)  # it goes on from step 4, and comes as far
    subprocess.run(["umount", "--lazy", folder], check=True)
    goes_on(command, whole, out)


def test_a_disk_that_is_full_from_the_start(disk, image_folder):
    (disk / "other").write_bytes(bytes((64 << 20) - 8192))
    result = run_here("pretrain", image_folder, "--out", disk / "run", *tiny_arguments())
    assert_refused(result, "could not be written: no space left")

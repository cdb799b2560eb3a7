"""Two runs never write into one folder."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.core import lock
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

# Holds the lock of a folder; its fork stands for a loading process that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from hpm.core import lock

lock.acquire(Path(sys.argv[1]))
running, begun = os.pipe()
if os.fork() == 0:
    os.write(begun, b"1")
    time.sleep(100)
    os._exit(0)
os.read(running, 1)
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def hold():
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_free(folder):
    with open(folder / lock.FILE, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_second_run_is_refused_until_the_first_is_dead(image_folder, tmp_path, hold):
    out = tmp_path / "run"
    first = hold(out)
    command = ("pretrain", image_folder, "--out", out, *tiny_arguments())
    refused = run_here(*command)
    assert_refused(refused, f"{out} is in use by another run (process {first.pid} on")
    assert [path.name for path in out.iterdir()] == [lock.FILE]
    first.kill()
    first.wait()
    assert is_free(out)  # though its fork lives on
    result = run_here(*command)
    assert result.returncode == 0, result.stderr
    assert is_free(out)


def test_the_lock_is_held_while_training_and_no_longer(image_folder, tmp_path, monkeypatch):
    out, seen = tmp_path / "run", []

    def fail(*arguments):
        seen.append(is_free(out))
        raise hpm.UserError("something")

    monkeypatch.setattr(sys.modules["hpm.pretraining"], "train_step", fail)
    with pytest.raises(hpm.UserError, match="something"):
        hpm.pretrain(data=str(image_folder), out=str(out), **TINY)
    assert seen == [False] and is_free(out)


def test_a_folder_that_is_refused_is_left_as_it_was(image_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(hpm.UserError, match="is no run folder"):
        hpm.pretrain(data=str(image_folder), out=str(tmp_path), **TINY)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_file_system_without_locks_trains_all_the_same(image_folder, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    run = hpm.pretrain(data=str(image_folder), out=str(tmp_path / "run"), **TINY)
    log = (run.folder / "train.log").read_text()
    assert run.backbone.exists() and log.count("has no locks (no locks available)") == 1


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("ext4", "rw", None),
        ("nfs4", "rw,vers=4.2,local_lock=none", None),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "nfs local_lock=all"),
        ("nfs", "rw,vers=3,local_lock=posix", None),
        ("lustre", "rw,flock", None),
        ("lustre", "rw,localflock", "lustre localflock"),
        ("fuse.sshfs", "rw", "fuse.sshfs"),
    ],
)
def test_a_network_file_system_whose_locks_are_local(kind, options, said, tmp_path, monkeypatch):
    """A mount below another of the same name, and one of a name that has a space."""
    folder = tmp_path / "net work" / "run"
    lines = ["1 0 8:1 / / rw - ext4 /dev/sda rw"]
    for below in ("net work", "net work/other"):
        where = str(tmp_path / below).replace(" ", "\\040")
        lines.append(f"2 1 0:9 / {where} rw,relatime shared:1 - {kind} server:/x {options}")
    (tmp_path / "mountinfo").write_text("\n".join(lines))
    monkeypatch.setattr(lock, "MOUNTS", tmp_path / "mountinfo")
    note = lock.acquire(folder)
    try:
        assert not is_free(folder)  # on this machine, it is a lock
        assert (note and f"no locks of {folder} ({said})" in note) if said else note is None
    finally:
        lock.release(folder)


@pytest.mark.slow
def test_two_runs_that_start_at_once(image_folder, tmp_path):
    """One trains, and the other is refused, whichever is first."""
    out = tmp_path / "run"
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "hpm", "pretrain", str(image_folder), "--out", str(out)]
        runs = [
            subprocess.Popen(
                [*command, *tiny_arguments(steps=30)], stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        said = [run.communicate(timeout=240)[1] for run in runs]
        assert sorted(run.returncode for run in runs) == [0, 2], said
        assert sum("is in use by another run" in text for text in said) == 1
        assert len(hpm.Run(out).metrics()) >= 15 and is_free(out)


@pytest.mark.slow
def test_two_runs_where_no_lock_holds(image_folder, tmp_path):
    """As on two machines of which neither sees the other's lock: what they write is damaged by
    neither, although either may find that its temporary files are gone."""
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(
        "import fcntl, sys\nfrom hpm.commands import cli\nfcntl.flock = lambda *a: None\n"
        "sys.exit(cli.main())\n"
    )
    arguments = tiny_arguments(steps=40, checkpoint_every="1 step")
    command = [sys.executable, str(program), "pretrain", str(image_folder), "--out", str(out)]
    command += arguments
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=240)[1] for run in runs]
    assert all(run.returncode in (0, 2) for run in runs), said
    assert not any("Traceback" in text for text in said), said
    for path in list_checkpoints(out / "checkpoints"):
        assert load_checkpoint(path).meta["step"] > 0


def test_two_fine_tunings_in_one_folder(finished_run, image_folder, tmp_path, hold):
    options = {"out": str(tmp_path), "epochs": 1, "batch_size": 12, "workers": 0}
    given = ("finetune", str(finished_run.folder), str(image_folder))
    (folder,) = _folders(tmp_path, given, options)
    (folder / "classifier.safetensors").unlink()
    first = hold(folder)
    with pytest.raises(hpm.UserError, match=rf"in use by another run \(process {first.pid}"):
        hpm.evaluate(*given, **options)
    first.kill()
    first.wait()
    assert hpm.evaluate(*given, **options).values and is_free(folder)


def _folders(out, given, options):
    hpm.evaluate(*given, **options)
    return [file.parent for file in out.rglob("classifier.safetensors")]


def test_a_released_lock_is_free_though_its_file_is_still_shared(tmp_path):
    """As with a program that is being started, until it runs."""
    lock.acquire(tmp_path)
    shared = os.dup(lock._held[tmp_path.resolve()])
    lock.release(tmp_path)
    assert is_free(tmp_path)
    os.close(shared)


def test_whether_a_lock_may_be_held(tmp_path):
    assert not lock.may_be_held(tmp_path), "nobody ever locked it"
    lock.acquire(tmp_path)
    assert lock.may_be_held(tmp_path)
    with open(tmp_path / lock.FILE) as file:  # as another process sees it
        held = lock._held.pop(tmp_path.resolve())
        assert lock.may_be_held(tmp_path)
        lock._held[tmp_path.resolve()] = held
        lock.release(tmp_path)
        assert not lock.may_be_held(tmp_path)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking left no lock behind

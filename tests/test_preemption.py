"""Schedulers signal every process of a job: the run saves, and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny_arguments

from hpm.checkpoint import list_checkpoints, load_checkpoint

TORCHRUN = [
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
]  # fmt: skip


class Job:
    """A command in a process group of its own, as a scheduler starts it."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def members(self) -> list[int]:
        """Processes of the job that are alive, by the group that they share."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(folder.name)
                # The fields after the command's name in parentheses: state, parent, group.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(pid)
        return found

    def wait_until(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal_all(self, number):
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def errors(self):
        return self.process.communicate(timeout=120)[1]

    def all_gone(self, seconds=20):
        deadline = time.monotonic() + seconds
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.members()


@pytest.fixture
def job():
    started = []

    def start(*command):
        started.append(Job(*command))
        return started[-1]

    yield start
    for each in started:
        each.signal_all(signal.SIGKILL)
        each.process.communicate()


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
OPTIONS = {
    "steps": 2000, "checkpoint_every": "100%", "log_every": 1, "workers": 2, "holdout": 0,
}  # fmt: skip


def has_trained(out):
    metrics = out / "metrics.jsonl"
    return lambda: metrics.exists() and bool(metrics.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves(number, image_folder, tmp_path, job):
    out = tmp_path / "run"
    run = job("-m", "hpm", "pretrain", image_folder, "--out", out, *tiny_arguments(**OPTIONS))
    run.wait_until(has_trained(out))
    assert len(run.members()) == 3  # the loading workers are members, so they are signalled too
    run.signal_all(number)
    errors = run.errors()
    assert run.process.returncode == 128 + number, errors
    assert "stopped and saved" in errors and "Traceback" not in errors
    (saved,) = list_checkpoints(out / "checkpoints")
    assert 0 < load_checkpoint(saved).meta["step"] < 2000
    assert run.all_gone()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_of_torchrun_saves(number, image_folder, tmp_path, job):
    out = tmp_path / "run"
    options = tiny_arguments(**OPTIONS | {"workers": 1})
    run = job(*TORCHRUN, "-m", "hpm", "pretrain", image_folder, "--out", out, *options)
    run.wait_until(has_trained(out))
    run.signal_all(number)
    errors = run.errors()
    (saved,) = list_checkpoints(out / "checkpoints")
    assert 0 < load_checkpoint(saved).meta["step"] < 2000
    assert errors.count("stopped and saved") == 1, errors
    assert "DataLoader worker" not in errors
    assert run.all_gone()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_fine_tuning_saves_as_well(number, finished_run, image_folder, tmp_path, job):
    command = [
        "-m", "hpm", "eval", "finetune", finished_run.folder, image_folder, "--out", tmp_path,
        "--epochs=2000", "--batch-size=12", "--workers=2", "--baselines=false",
    ]  # fmt: skip
    run = job(*command)

    def trains():
        return any(file.read_text() for file in tmp_path.rglob("metrics.jsonl"))

    run.wait_until(trains)
    run.signal_all(number)
    errors = run.errors()
    assert run.process.returncode == 128 + number, errors
    assert list(tmp_path.rglob("step_*.safetensors"))
    assert run.all_gone()


@pytest.mark.slow
def test_no_worker_survives_a_killed_run(image_folder, tmp_path, job):
    out = tmp_path / "run"
    run = job("-m", "hpm", "pretrain", image_folder, "--out", out, *tiny_arguments(**OPTIONS))
    run.wait_until(has_trained(out))
    run.process.kill()
    run.process.wait()
    assert run.all_gone()

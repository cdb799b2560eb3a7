"""Schedulers signal every process of a job: the run saves, and nothing is left behind."""

import signal
from pathlib import Path

import pytest
from helpers import tiny_arguments
from jobs import TORCHRUN, Job

from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

SIGNALS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]


@pytest.fixture
def job():
    started = []

    def start(*command):
        started.append(Job(*command))
        return started[-1]

    yield start
    for each in started:
        each.end()


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
HUNG = """
import signal, sys
from hpm.data.loader import training_loader
from hpm.data.sources import open_source

def view(source, key):
    if key[1] == 1:
        print("hangs", flush=True)
        signal.pause()
    return decode(source, key)

from hpm.data.loader import EvaluationViews
decode = EvaluationViews((8, 8), 3)
source = open_source(sys.argv[1]).train
batches = iter(training_loader(source, view, [[(0, 0)], [(0, 1)]], 1, False))
print(next(batches).images.shape, file=sys.stderr)
"""


def test_a_worker_that_hangs_does_not_outlive_its_parent(image_folder, tmp_path, job):
    """Python waits at its end for the processes that it started: it must have killed them."""
    program = tmp_path / "program.py"
    program.write_text(HUNG)
    run = job(program, image_folder)
    assert "torch.Size([1, 3, 8, 8])" in run.errors(timeout=60)
    assert run.process.returncode == 0 and run.all_gone()


OPTIONS = {
    "steps": 2000,
    "checkpoint_every": "100%",
    "log_every": 1,
    "workers": 2,
    "holdout": 0,
}


def has_trained(out):
    metrics = out / "metrics.jsonl"
    return lambda: metrics.exists() and bool(metrics.read_text())


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_of_torchrun_saves(number, image_folder, tmp_path, job):
    out = tmp_path / "run"
    options = tiny_arguments(**OPTIONS | {"workers": 1})
    hpm = ["-m", "hpm", "pretrain", image_folder, "--out", out, *options]
    run = job(*TORCHRUN, 2, *SIGNALS, *hpm)
    run.wait_until(has_trained(out))
    assert len(run.members()) == 5  # torchrun, two processes, a loading worker of each
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
        "-m",
        "hpm",
        "eval",
        "finetune",
        finished_run.folder,
        image_folder,
        "--out",
        tmp_path,
        "--epochs=2000",
        "--batch-size=12",
        "--workers=2",
        "--baselines=false",
    ]
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
    run.process.wait(timeout=60)
    assert run.all_gone()

"""A real Slurm of two nodes: a training comes through its time limit, the loss of a node,
preemption and `scancel`, by the script of docs/scaling.md and by `hpm slurm`."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_arguments
from jobs import hpm_on
from slurm import slurm, wait_until  # noqa: F401

import hpm
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SCALING = Path(__file__).parents[2] / "docs/scaling.md"
STEPS = 400
OPTIONS = {
    "steps": STEPS,
    "checkpoint_every": "100%",
    "log_every": 1,
    "base_lr": 1e-3,
    "cache": "false",
}

# Slow while a file is there, so that something can happen to the training.
SOURCE = """
import time
from pathlib import Path

from hpm.data.sources import open_source

class Images:
    def __init__(self, source):
        self.source, self.name, self.labels = source, source.name, source.labels
        self.classes = source.classes
        self.is_deep, self.path = source.is_deep, source.path

    def __len__(self):
        return len(self.source)

    def open(self, index):
        if Path("{folder}/slow").exists():
            time.sleep(0.1)
        return self.source.open(index)

    def read(self, index):
        return None

def images():
    return Images(open_source("{images}").train)
"""


@pytest.fixture
def training(slurm, image_folder, tmp_path, monkeypatch):  # noqa: F811
    text = SOURCE.format(folder=tmp_path, images=image_folder)
    (tmp_path / "slow_images.py").write_text(text)
    found = [str(tmp_path), str(Path(hpm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Training(slurm, tmp_path)


class Training:
    def __init__(self, cluster, folder: Path):
        self.cluster, self.folder, self.out = cluster, folder, folder / "run"
        self.job = ""

    def by_script(self) -> str:
        """Submit the script of the documentation. Returns what sbatch says."""
        (script,) = re.findall(r"^(#!/bin/bash\n#SBATCH.*?)^```", SCALING.read_text(), re.M | re.S)
        command = ["slow_images:images", *tiny_arguments(**OPTIONS)]
        for old, new in (
            ("--nodes 4", "--nodes 2"),
            ("--nnodes 4", "--nnodes 2"),
            ("--gpus-per-node 8", "--gpus-per-node 1"),
            ("--nproc-per-node 8", "--nproc-per-node 1"),
            ("--cpus-per-task 96", "--cpus-per-task 2"),
            ("$SECONDS -lt 600", "$SECONDS -lt 1"),
            ("imagenet/ --config vit_base_in1k", shlex.join(command)),
            ("runs/vit_base", str(self.out)),
        ):
            assert old in script
            script = script.replace(old, new)
        (self.folder / "job.sh").write_text(script)
        return self.cluster.run("sbatch", "-o", self.folder / "log", self.folder / "job.sh")

    def by_submitit(self) -> str:
        command = ["slurm", "pretrain", "slow_images:images", "--out", self.out]
        asked = ["--nodes", 2, "--gpus-per-node", 1, "--cpus-per-process", 2]
        arguments = [*command, *asked, *tiny_arguments(**OPTIONS)]
        return self.cluster.run(sys.executable, "-m", "hpm", *arguments)

    def submit(self, how):
        said = how()
        found = re.search(r"job (\d+)", said)
        assert found, said
        self.job = found[1]

    def steps(self) -> list[int]:
        file = self.out / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def goes_on(self, times: int):
        """Wait until it has resumed for the n-th time, and has done a step since."""
        wait_until(lambda: len(self.resumed()) == times)
        resumed = self.resumed()[-1] if times else 0
        wait_until(lambda: self.steps() and self.steps()[-1] > resumed)

    def resumed(self) -> list[int]:
        """The steps at which it has resumed."""
        file = self.out / "train.log"
        found = re.findall(
            r"resuming from .*, step (\d+)", file.read_text() if file.exists() else ""
        )
        return [int(step) for step in found]

    def saved(self) -> int:
        """The step of the last checkpoint."""
        files = list_checkpoints(self.out / "checkpoints")
        return load_checkpoint(files[-1]).meta["step"] if files else 0

    def left(self, *others: str) -> str:
        """Wait until it runs no longer (and is in none of other states). Returns its state."""
        states = ("RUNNING", "COMPLETING", *others)
        wait_until(lambda: self.cluster.state(self.job) not in states)
        return self.cluster.state(self.job)


@pytest.mark.parametrize("how", ["by_script", "by_submitit"])
def test_a_training_on_a_cluster(how, training, image_folder):
    cluster, submit = training.cluster, getattr(training, how)
    slow = training.folder / "slow"
    slow.touch()
    training.submit(submit)
    training.goes_on(0)

    # The time limit is near: Slurm sends the signal, and it saves and goes back into the queue.
    minutes = 2 + _minutes(cluster, training.job)
    cluster.run("scontrol", "update", f"JobId={training.job}", f"TimeLimit={minutes}")
    assert training.left() == "PENDING"
    stopped = training.saved()
    assert 0 < stopped < STEPS
    cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=1-00:00:00")
    training.goes_on(1)
    assert training.resumed() == [stopped]

    # A node is lost.
    cluster.kill("node2")
    assert training.left() == "PENDING"
    cluster.boot("node2")
    training.goes_on(2)
    assert training.resumed() == [stopped, stopped]

    # Another job is more urgent.
    urgent = ("--partition", "urgent", "--nodes", 2, "--gpus-per-node", 2, "--wrap", "sleep 3")
    cluster.run("sbatch", "-o", "/dev/null", *urgent)
    assert training.left() == "PENDING"
    preempted = training.saved()
    assert stopped < preempted < STEPS
    training.goes_on(3)
    assert training.resumed()[-1] == preempted

    # The user ends it, and starts it again.
    cluster.run("scancel", training.job)
    assert training.left() == "CANCELLED"
    cancelled = training.saved()
    assert preempted < cancelled < STEPS
    slow.unlink()
    training.submit(submit)
    assert training.left("PENDING") == "COMPLETED"
    assert training.resumed()[-1] == cancelled

    whole = training.folder / "whole"
    done = hpm_on(2, "pretrain", image_folder, "--out", whole, *tiny_arguments(**OPTIONS))
    assert done.returncode == 0, done.stderr
    expected, found = (
        load_checkpoint(hpm.Run(r).latest_checkpoint()) for r in (whole, training.out)
    )
    for part in ("model", "teacher", "optimizer"):
        for name, tensor in getattr(expected, part).items():
            assert torch.equal(tensor, getattr(found, part)[name]), (part, name)
    assert (training.out / "backbone.safetensors").exists()


def _minutes(cluster, job: str) -> int:
    """How long a job has been running, rounded down."""
    told = cluster.run("scontrol", "show", "job", job)
    days, hours, minutes, _ = re.search(r"RunTime=(?:(\d+)-)?(\d+):(\d+):(\d+)", told).groups()
    return 1440 * int(days or 0) + 60 * int(hours) + int(minutes)

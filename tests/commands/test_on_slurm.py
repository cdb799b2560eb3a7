"""A job of submitit saves, goes back into the queue, and resumes; on this machine instead of
Slurm."""

import contextlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, run_here, tiny_arguments
from jobs import Job

import hpm
from hpm.commands.on_slurm import preempted
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

LOCAL = ("--cluster", "local")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def tasks(job):
    """The processes of the job that run the verb."""
    for pid in job.members():
        with contextlib.suppress(OSError):
            if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield pid


def test_mistakes_are_found_before_anything_is_submitted(image_folder, tmp_path):
    out = tmp_path / "run"
    command = ("slurm", "pretrain", image_folder, "--out", out, *LOCAL)
    assert_refused(run_here(*command, "--mask", "rando"), "mask is 'rando'; did you mean 'random'")
    assert_refused(
        run_here(*command, "--nodes", 2), "submitit: LocalExecutor can use only one node"
    )
    assert_refused(run_here(*command, "--time", "soon"), "'soon' is not a time")
    assert not out.exists()


def test_what_is_submitted(image_folder, tmp_path, monkeypatch):
    """To an sbatch that stands in for Slurm's."""
    for name, text in (
        ("sbatch", "cp $1 $HERE/submitted; echo Submitted batch job 12"),
        ("srun", ""),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = ("slurm", "pretrain", image_folder, "--out", tmp_path / "run", "--nodes", 4)
    more = ("--gpus-per-node", 8, "--time", "90m", "--sbatch", "account=vision,constraint=h100")
    result = run_here(*command, *more)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("job 12: ")
    script = (tmp_path / "submitted").read_text()
    wanted = ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8", "time=90")
    for line in (*wanted, "signal=USR2@120", "account=vision", "constraint=h100"):
        assert f"#SBATCH --{line}\n" in script
    assert "--cpus-per-task=8 --kill-on-bad-exit=1 " in script.partition("srun")[2]


@pytest.mark.parametrize(("time", "expected"), [("None", False), ("2026-11-26T20:02:08", True)])
def test_who_ends_a_job(time, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not preempted("12"), "no Slurm is here"
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\necho JobId=$3 PreemptTime={time} Deadline=N/A\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    assert preempted("12") == expected


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("processes", [1, 2])
def test_a_preempted_job_saves_and_resumes(processes, image_folder, tmp_path):
    out = tmp_path / "run"
    options = {"steps": 300, "checkpoint_every": "100%", "log_every": 1, "base_lr": 1e-3}
    command = ("slurm", "pretrain", image_folder, "--out", out, *LOCAL)
    job = Job("-m", "hpm", *command, "--gpus-per-node", processes, *tiny_arguments(**options))
    try:
        metrics = out / "metrics.jsonl"
        job.wait_until(lambda: metrics.exists() and bool(metrics.read_text()), alive=False)
        found = list(tasks(job))
        assert len(found) == processes
        for pid in found:
            os.kill(pid, signal.SIGUSR2)
        job.wait_until(lambda: len(list_checkpoints(out / "checkpoints")) > 0, alive=False)
        stopped = load_checkpoint(list_checkpoints(out / "checkpoints")[0]).meta["step"]
        assert job.all_gone(seconds=240)
    finally:
        job.end()
    log = (out / "train.log").read_text()
    assert log.count("resuming from") == log.count(f", step {stopped}\n") == 1 and stopped < 300
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 301))
    assert (out / "backbone.safetensors").exists()
    logs = sorted((tmp_path / "run.jobs").rglob("*_log.out"))
    assert len(logs) == processes and "Requeued job" in logs[0].read_text()


@pytest.mark.slow
@needs_proc
def test_embedding(image_folder, tmp_path):
    from hpm.models.architecture import Architecture
    from hpm.models.build import build_encoder
    from hpm.weights.own import save_backbone

    file, architecture = tmp_path / "b.safetensors", Architecture((16, 16), (4, 4), 3, 32, 1, 2)
    state = build_encoder(architecture, 0).state_dict()
    save_backbone(file, state, architecture, [0.5] * 3, [0.3] * 3)
    command = ("embed", file, image_folder, "--workers", 0, "--device", "cpu")
    job = Job("-m", "hpm", "slurm", *command, "--out", tmp_path / "there.npy", *LOCAL)
    try:
        assert job.all_gone(seconds=120)
    finally:
        job.end()
    assert run_here(*command, "--out", tmp_path / "here.npy").returncode == 0
    one, two = (hpm.Embeddings.load(tmp_path / f"{name}.npy") for name in ("here", "there"))
    np.testing.assert_array_equal(one.features, two.features)

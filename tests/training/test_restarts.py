"""torchrun starts all processes again when one dies: the run goes on from its last checkpoint."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from helpers import tiny_arguments
from jobs import Job

from hpm.weights.checkpoint import list_checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


# Without it, torchrun keeps one store for all attempts, which each node numbers by itself: after a
# failure on one node, the processes would look for each other under old addresses.
@pytest.fixture(autouse=True)
def _store_of_each_attempt(monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def node(port, *command):
    """torchrun on a node of two, with one process."""
    return Job(
        *("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"),
        *("--max-restarts", 3, "-m", "hpm", *command),
    )


def rank_of(pid):
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_of_two_nodes_is_killed(killed, shard, image_folder, tmp_path):
    """Each node has a torchrun of its own; either of the two processes is killed."""
    out = tmp_path / "run"
    options = {"steps": 60, "checkpoint_every": "5 steps", "log_every": 1, "base_lr": 1e-3}
    arguments = tiny_arguments(**options | ({"shard": True} if shard else {}))
    port = free_port()
    nodes = [node(port, "pretrain", image_folder, "--out", out, *arguments) for _ in range(2)]
    try:
        nodes[0].wait_until(lambda: len(list_checkpoints(out / "checkpoints")) > 0)
        (victim,) = [pid for each in nodes for pid in each.members() if rank_of(pid) == killed]
        os.kill(victim, signal.SIGKILL)
        errors = [each.errors() for each in nodes]
        assert [each.process.returncode for each in nodes] == [0, 0], errors
        assert all(each.all_gone() for each in nodes)
    finally:
        for each in nodes:
            each.end()
    assert "resuming from" in (out / "train.log").read_text()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 60
    assert (out / "backbone.safetensors").exists()

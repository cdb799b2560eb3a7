"""`hpm ray VERB` gives what the verb gives, on a cluster of local nodes, one of which is lost."""

import json

import numpy as np
import pytest
from helpers import assert_refused, run_here, run_hpm, tiny_arguments
from jobs import Job

import hpm
from hpm.weights.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow
OPTIONS = {"log_every": 1, "base_lr": 1e-3}
MEMORY = {"object_store_memory": 100 * 2**20}


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU each, one of which is the head."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **MEMORY})
    cluster.add_node(num_cpus=1, **MEMORY)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_node_is_killed_and_another_takes_its_place(cluster, image_folder, tmp_path):
    out = tmp_path / "run"
    options = OPTIONS | {"steps": 300, "checkpoint_every": "5 steps"}
    command = ("ray", "pretrain", image_folder, "--out", out, "--processes", 2)
    run = Job("-m", "hpm", *command, *tiny_arguments(**options))
    try:
        run.wait_until(lambda: len(list_checkpoints(out / "checkpoints")) > 0, seconds=300)
        (node,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, **MEMORY)
        errors = run.errors()
        assert run.process.returncode == 0, errors
    finally:
        run.end()
    log = (out / "train.log").read_text()
    assert "2 processes" in log and "resuming from" in log
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 301)) and steps[-1] == 300
    assert (out / "backbone.safetensors").exists()


def test_the_same_results(cluster, image_folder, tmp_path):
    """Of a training, of its mistakes, of prepare, and of embed."""
    arguments = tiny_arguments(**OPTIONS)
    there, here = tmp_path / "there", tmp_path / "here"
    command = ("pretrain", image_folder, *arguments)
    found = run_hpm("ray", *command, "--out", there, "--processes", 2)
    assert found.returncode == 0, found.stderr
    assert run_here(*command, "--out", here).returncode == 0
    for one, two in zip(hpm.Run(here).metrics(), hpm.Run(there).metrics()):
        for name in ("reconstruction_loss", "predictor_loss", "grad_norm"):
            assert one.get(name) == pytest.approx(two.get(name), rel=2e-4)

    broken = ("ray", "pretrain", image_folder, "--out", image_folder, "--processes", 2)
    found = run_hpm(*broken, *arguments)
    assert_refused(found, "exists and is no run folder")
    assert (found.stdout + found.stderr).count("vit_nano (") == 0

    stopped = ("ray", "pretrain", image_folder, "--out", tmp_path / "stopped", "--processes", 2)
    found = run_hpm(*stopped, *arguments, "--steps", 10**6, "--stop-after", "1s")
    assert found.returncode == 128 + 15, found.stderr
    assert found.stderr.count("stopped and saved; run the same command again to resume") == 1

    command = ("embed", there, image_folder, "--shard-images", 10, "--device", "cpu")
    found = run_hpm("ray", *command, "--out", tmp_path / "there.npy")
    assert found.returncode == 0 and "48 images, " in found.stdout, found.stderr
    assert run_here(*command, "--out", tmp_path / "here.npy", "--workers", 0).returncode == 0
    one, two = (hpm.Embeddings.load(tmp_path / f"{name}.npy") for name in ("here", "there"))
    assert list(one.paths) == list(two.paths) and one.about == two.about
    np.testing.assert_allclose(one.features, two.features, rtol=0, atol=1e-5)

    (image_folder / "class_0" / "broken.png").write_bytes(b"none")
    try:
        command = ("prepare", image_folder, "--size", 16)
        found = run_hpm("ray", *command, "--out", tmp_path / "prepared")
        assert found.returncode == 0 and "48 images, " in found.stdout, found.stderr
        assert run_here(*command, "--out", tmp_path / "same", "--workers", 0).returncode == 0
    finally:
        (image_folder / "class_0" / "broken.png").unlink()
    files = sorted(path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*"))
    for file in files:
        if (tmp_path / "same" / file).is_file():
            one, two = ((tmp_path / name / file).read_bytes() for name in ("same", "prepared"))
            assert one == two, file
    assert len(files) == len(list((tmp_path / "prepared").rglob("*"))) > 4

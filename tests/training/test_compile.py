"""Compiled training is eager training, without graph breaks, and never waits for the device.

In processes of their own: the shape checks of the tests cannot be compiled.
"""

import json
import subprocess
import sys

import pytest
import torch
from helpers import run_hpm, tiny_arguments

STEPS = """
import json, sys, torch
from hpm.commands.bench_step import noise_batch
from hpm.core.config import PretrainConfig
from hpm.pretraining import train_step
from hpm.training.build import build_run

out, device, compiled, way = sys.argv[1:]
config = PretrainConfig(
    data="demo", out=out, model="vit_nano", image_size=16, patch_size=4, batch_size=8, steps=20,
    decoder_dim=32, decoder_depth=1, base_lr=1e-2, holdout=0, normalize="imagenet",
    compile=compiled, device=device, **json.loads(way),
)
state = build_run(config, torch.device(device))
batch = noise_batch(state)
batch = batch.pin_memory() if device == "cuda" else batch
"""

GRAPHS = """
from torch._dynamo.utils import counters
for step in range(3):
    train_step(state, batch, step, num_hard=2)
before = counters["stats"]["unique_graphs"]
for step in range(3, 8):
    train_step(state, batch, step, num_hard=step)  # the share of hard patches changes
assert not counters["graph_break"], dict(counters["graph_break"])
assert counters["stats"]["unique_graphs"] == before > 0, counters["stats"]
"""

NO_WAIT = """
for step in range(4):
    train_step(state, batch, step, num_hard=3)
torch.cuda.set_sync_debug_mode("error")
for step in range(4, 8):
    done = train_step(state, batch, step, num_hard=3)
torch.cuda.set_sync_debug_mode("default")
assert done.losses["reconstruction_loss"].isfinite().item()
"""

WAYS = [{}, {"teacher_scale": 0.5}, {"mine_by": "memory", "predictor_loss": "none"}]


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_compiled_equals_eager_over_300_steps(image_folder, tmp_path):
    """The same within 1 %: float32 sums in another order drift apart slowly."""
    losses = {}
    for mode in ("false", "true"):
        options = tiny_arguments(
            steps=300, log_every=10, checkpoint_every="100%", base_lr=1e-3, compile=mode
        )
        result = run_hpm("pretrain", image_folder, "--out", tmp_path / mode, *options)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / mode / "metrics.jsonl").read_text().splitlines()
        read = [json.loads(line).get("reconstruction_loss") for line in lines]
        losses[mode] = [loss for loss in read if loss is not None]
    assert len(losses["true"]) == 30
    assert losses["true"] == pytest.approx(losses["false"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_graph_breaks_and_no_recompilation(way, tmp_path):
    run_python(STEPS + GRAPHS, tmp_path / "run", "cpu", "true", json.dumps(way))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_never_waits_for_the_device(way, compiled, tmp_path):
    run_python(STEPS + NO_WAIT, tmp_path / "run", "cuda", compiled, json.dumps(way))


REAL_RUN_AND_BENCHMARK = """
import json, sys, tempfile, torch
from pathlib import Path
import hpm
from hpm.commands import bench_step as bench
from hpm.commands.options import BenchConfig

graphs, compile_with = [], torch.compile

def record(graph, inputs):
    assert all(isinstance(value, torch.Tensor) for value in inputs), "a dynamic shape"
    graphs.append(sorted(tuple(value.shape) for value in inputs))
    return graph.forward

torch.compile = lambda part, **options: compile_with(part, backend=record, **options)
options = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    hpm.pretrain("demo", out=f"{folder}/run", holdout=12, eval_every="50%", log_every=2,
                 workers=0, checkpoint_every="100%", probe=sys.argv[2] or None, **options)
    trained = list(graphs)
    graphs.clear()
    torch.compiler.reset()
    config = BenchConfig(**options)
    state = bench.build_bench_run(config, {}, Path(folder) / "bench", torch.device("cpu"))
    for step in range(2):
        bench.train_step(state, bench.noise_batch(state), step, num_hard=2)
    state.log.close()
assert len(trained) == 2, [len(graph) for graph in trained]  # the student's and the teacher's
assert sorted(trained) == sorted(graphs), (trained, graphs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"teacher_scale": 0.5}])
def test_a_real_run_compiles_what_the_benchmark_measures(way, image_folder):
    """Figures, measures and probes, whose batches have other shapes, leave the graphs alone."""
    options = {
        "model": "vit_nano",
        "image_size": 16,
        "patch_size": 4,
        "batch_size": 16,
        "steps": 4,
        "decoder_dim": 32,
        "decoder_depth": 1,
        "compile": "true",
        "hard_share_start": 0.25,
    }
    run_python(REAL_RUN_AND_BENCHMARK, json.dumps(options | way), "" if way else image_folder)

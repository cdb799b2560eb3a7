import json

import pytest
import torch
from fake_gpu import fake_gpu
from helpers import assert_refused, run_here
from torch import nn

from hpm.commands import bench_dense as bench
from hpm.commands.multiply_adds import count_multiply_adds
from hpm.commands.options import BenchDetectConfig, BenchSegmentConfig
from hpm.models.linear import Linear

SMALL = {
    "model": "vit_nano",
    "image_size": 32,
    "patch_size": 8,
    "batch_size": 2,
    "classes": 3,
    "channels": 16,
    "repeats": 1,
    "steps_each": 2,
    "device": "cpu",
}
FEW = {"proposals": 8, "box_batch_size": 8, "objects": 2}


@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_the_command_line(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "matrix_product_flops", lambda device: 2e11)
    file = tmp_path / "report.json"
    options = SMALL | ({"window_size": 2} | FEW if kind == "detect" else {}) | {"json": file}
    result = run_here(
        "bench", kind, *[f"--{name.replace('_', '-')}={x}" for name, x in options.items()]
    )
    assert result.returncode == 0, result.stderr
    assert "of the matrix product, %" in result.stdout and "training" in result.stdout
    report = json.loads(file.read_text())
    assert report["matrix_product_tflops"] == pytest.approx(0.2)
    assert report["head"] == kind and set(report["phases_ms"]) == set(bench.PHASES)
    for found in report["measured"].values():
        rate = 2 / (found["step_ms"] / 1e3)
        assert found["images_per_second"] == pytest.approx(rate)
        tflops = 2 * found["multiply_adds_per_image"] * rate / 1e12
        share = tflops / report["matrix_product_tflops"]
        assert found["share_of_matrix_product"] == pytest.approx(share)
    training, testing = (report["measured"][name] for name in ("training", "testing"))
    assert training["multiply_adds_per_image"] > 1.5 * testing["multiply_adds_per_image"]


def test_the_peak_memory_of_a_gpu_is_not_that_of_counting(monkeypatch):
    """Operations are counted with attention written out, which needs far more memory."""
    monkeypatch.setattr(bench, "matrix_product_flops", lambda device: 2e11)
    peak = [0.0]

    def count(run):
        peak[0] = 9e9
        return count_multiply_adds(run)

    monkeypatch.setattr(bench, "count_multiply_adds", count)
    with fake_gpu(), monkeypatch.context() as patch:
        reset = torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 1e9)
        patch.setattr(*reset)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
        report = bench.bench_dense(BenchSegmentConfig(**SMALL | {"device": "cuda"}))
    assert report["memory_gb"] == 1


def test_a_step_trains_everything_at_a_rate_of_zero():
    """All parameters get a gradient, and none changes."""
    cpu = torch.device("cpu")
    for each in (
        bench.SegmentBench(BenchSegmentConfig(**SMALL), cpu),
        bench.DetectBench(BenchDetectConfig(**SMALL, **FEW), cpu),
    ):
        weights = {n: p for n, p in each.trained.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in weights.items()}
        each.loss().backward()
        without = [name for name, p in weights.items() if p.grad is None]
        assert all("drop" in name or "cls_token" in name for name in without), without
        each.train_step()
        assert all(torch.equal(before[name], p) for name, p in weights.items())


def test_multiply_adds_of_our_linear_layers_are_counted():
    """oneDNN's operator on a CPU, which PyTorch's counter does not know."""
    layers = nn.Sequential(Linear(6, 5), nn.Linear(5, 4))
    x = torch.randn(2, 3, 6, requires_grad=True)
    forward, y = count_multiply_adds(lambda: layers(x))
    backward, _ = count_multiply_adds(lambda: y.sum().backward())
    products = 6 * (6 * 5 + 5 * 4)
    assert forward == products and backward == 2 * products


def test_bad_benchmarks():
    assert_refused(run_here("bench", "segment", "--batch-size=1"), "--batch-size")
    assert_refused(run_here("bench", "segment", "--image-size=33"), "33")
    assert_refused(run_here("bench", "detect", "--repeats=0"), "repeats")
    assert_refused(
        run_here("bench", "detect", "--model=vit_nano", "--patch-size=6", "--image-size=36"), "6"
    )

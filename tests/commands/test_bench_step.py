import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here, run_hpm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpm.commands import bench_step as bench
from hpm.commands.options import BenchConfig
from hpm.core.config import PretrainConfig
from hpm.models.architecture import resolve_model
from hpm.models.build import build_model

ROOT = Path(__file__).parents[2]
SMALL = ["--model=vit_nano", "--image-size=32", "--patch-size=8", "--batch-size=4",
         "--repeats=1", "--steps-each=1", "--device=cpu"]  # fmt: skip


@pytest.mark.parametrize("model", ["vit_nano", "vit_tiny"])
@pytest.mark.parametrize("predictor_loss", ["relative", "none"])
def test_multiply_adds_are_those_that_pytorch_counts(model, predictor_loss):
    config = PretrainConfig(
        "x", "y", model=model, image_size=64, patch_size=8, predictor_loss=predictor_loss
    )
    architecture = resolve_model(config)
    student = build_model(architecture).double()  # whose products are PyTorch's own
    images, ids = torch.randn(2, 3, 64, 64).double(), torch.arange(64).expand(2, -1)

    def counted(run):
        plain = sdpa_kernel(SDPBackend.MATH)  # whose products are all counted
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
            run()
        return counter.get_total_flops() / 2 / 2  # of two images; a multiply-add is two

    forward = counted(lambda: student(images, ids[:, :16], ids[:, 16:]))
    predictor = predictor_loss != "none"
    ours = bench.forward_multiply_adds(architecture, 0.75, predictor)
    assert ours == pytest.approx(forward, rel=0.01)
    if predictor:
        teacher = counted(lambda: student.predict_loss(images))
        ours = bench.forward_multiply_adds(architecture, 0.75, True, whole=True)
        assert ours == pytest.approx(teacher, rel=0.01)


def test_the_papers_sizes():
    """Per image: HPM about 2.3 times MAE (ViT-B/16, 224 px, ratio 0.75)."""
    hpm_config = PretrainConfig("x", "y", model="vit_base")
    mae_config = PretrainConfig("x", "y", model="vit_base", mask="random", predictor_loss="none")
    hpm, mae = (
        bench.step_multiply_adds(resolve_model(config), config)
        for config in (hpm_config, mae_config)
    )
    assert mae == pytest.approx(29e9, rel=0.03) and hpm == pytest.approx(68e9, rel=0.03)


def test_bench_step(tmp_path):
    result = run_hpm("bench", "step", *SMALL, "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr
    assert "HPM takes" in result.stdout and "teacher, ms" in result.stdout
    report = json.loads((tmp_path / "b.json").read_text())
    for name, found in report["methods"].items():
        assert found["images_per_second"] > 0 and found["memory_gb"] > 0
        assert all(math.isfinite(ms) and ms >= 0 for ms in found["phases_ms"].values())
        teacher, forward = found["phases_ms"]["teacher"], found["phases_ms"]["forward"]
        assert (teacher > 0.05 * forward) == (name == "HPM")  # else but the two marks apart
        seconds = found["step_ms"] / 1e3
        rate = 2 * found["multiply_adds_per_image"] * 4 / seconds / 1e12
        assert found["tflops"] == pytest.approx(rate, rel=1e-6)


def test_no_reading_is_the_first_of_its_turn(monkeypatch):
    """A method's first step after the other one's runs with cold caches: it takes longer."""
    now, last = [0.0], [None]

    def step(run, batch, number, num_hard):
        now[0] += 1 if last[0] is run else 10
        last[0] = run

    monkeypatch.setattr(bench, "train_step", step)
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench, "matrix_product_flops", lambda device: 1.0)
    monkeypatch.setattr(bench, "_peak_memory", lambda *_: dict.fromkeys(bench.METHODS, 0.0))
    config = BenchConfig(model="vit_nano", image_size=32, patch_size=8, batch_size=4, repeats=2,
                         steps_each=2, device="cpu")  # fmt: skip
    for found in bench.bench_step(config)["methods"].values():
        assert found["step_ms"] == 1000 and found["step_ms_spread"] == 0


def test_memory_is_that_of_a_method_alone(monkeypatch):
    monkeypatch.setattr(bench, "METHODS", {"HPM": {}})
    ballast = np.ones(2 * 10**8)  # 1.6 GB in this process
    config = BenchConfig(model="vit_nano", image_size=32, patch_size=8, batch_size=4, repeats=1,
                         steps_each=1, device="cpu")  # fmt: skip
    found = bench._peak_memory(config, torch.device("cpu"))
    assert 0.1 < found["HPM"] < ballast.nbytes / 1e9


def test_bad_benchmarks():
    assert_refused(run_here("bench"), "hpm bench step")
    assert_refused(run_here("bench", "step", *SMALL, "--repeats=0"), "repeats")
    assert_refused(run_here("bench", "step", "--patch-size=15"), "patch_size 15 does not divide")


def test_the_script_for_a_gpu_runs(tmp_path):
    result = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], capture_output=True, text=True, timeout=240, cwd=ROOT,
        env=os.environ | {"SMALL": "1", "OUT": str(tmp_path), "PYTHON": sys.executable},
    )  # fmt: skip
    assert result.returncode == 0 and "FAILED" not in result.stdout, result.stdout
    benchmark = json.loads((tmp_path / "small_eager.json").read_text())["methods"]["HPM"]
    # A real run, with held-out images, beside it; both speeds are printed.
    real = json.loads((tmp_path / "small_eager_run.json").read_text())
    assert real["steps"] == 20 and real["held_out"] == 8 and real["images_per_second"] > 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("real run")]
    for rate in (benchmark["images_per_second"], real["images_per_second"]):
        assert f"{rate:.1f} images/s" in line

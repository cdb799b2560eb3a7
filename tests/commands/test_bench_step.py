import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from jobs import FORKS

from hpm.commands import bench_step as bench
from hpm.commands import timing
from hpm.commands.multiply_adds import step_multiply_adds
from hpm.commands.options import BenchConfig
from hpm.core.config import PretrainConfig
from hpm.models.architecture import resolve_model

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model=vit_nano",
    "--image-size=32",
    "--patch-size=8",
    "--batch-size=4",
    "--repeats=1",
    "--steps-each=1",
    "--device=cpu",
]


def block(tokens, dim, outputs=None):
    """Multiply-adds of a Transformer block: keys and values of all tokens; queries, attention,
    projection and MLP of the outputs alone."""
    outputs = tokens if outputs is None else outputs
    return 2 * tokens * dim**2 + 2 * outputs * tokens * dim + 10 * outputs * dim**2


def decoder(patches, hidden, values, dim=64, depth=2):
    last = block(1 + patches, dim, hidden) + hidden * dim * values
    return (depth - 1) * block(1 + patches, dim) + last


def encoder(visible, pixels=192, dim=96, depth=4, decoder_dim=64):
    """With the projection to the decoders."""
    return (
        visible * pixels * dim + depth * block(1 + visible, dim) + (1 + visible) * dim * decoder_dim
    )


def multiply_adds(**options):
    config = PretrainConfig("x", "y", model="vit_nano", image_size=64, patch_size=8, **options)
    return step_multiply_adds(resolve_model(config), config)


@pytest.mark.slow
def test_multiply_adds_against_formulas():
    """vit_nano, 64 patches, 48 hidden: what the student learns, and what each way of mining adds,
    by the operations of the layers (to 2 %: a backward pass has no gradient of the images)."""
    student = 3 * (encoder(16) + decoder(64, 48, 192))
    plain = multiply_adds(mask="random", predictor_loss="none")
    assert plain == pytest.approx(student, rel=0.02)
    learning = multiply_adds(mask="random")  # the predictor learns, and nothing is mined
    assert learning == pytest.approx(student + 3 * decoder(64, 48, 1), rel=0.02)

    full = encoder(64) + decoder(64, 64, 1)
    masked = encoder(16) + decoder(64, 48, 1)
    small = encoder(16) + decoder(16, 16, 1)
    for options, teacher in (
        ({}, full),
        ({"teacher_view": "masked"}, 2 * masked),  # two masks hide every patch once
        ({"teacher_scale": 0.5}, small),
        ({"mine_every": 4}, full / 4),
        ({"mine_by": "memory"}, 0),
    ):
        extra = multiply_adds(**options) - learning
        assert extra == pytest.approx(teacher, rel=0.02), options
    # A ratio of 5/16 hides 20 of 64 patches: four masks.
    few = 3 * (encoder(44) + decoder(64, 20, 192) + decoder(64, 20, 1))
    found = multiply_adds(teacher_view="masked", mask_ratio=0.3125)
    assert found == pytest.approx(few + 4 * (encoder(44) + decoder(64, 20, 1)), rel=0.02)


def test_features_of_the_teacher_count_in_the_steps_between():
    """A target of features asks the encoder in every step; every second one, the predictor too."""
    values = 96
    learning = 3 * (encoder(16) + decoder(64, 48, values) + decoder(64, 48, 1))
    whole = encoder(64)
    config = PretrainConfig(
        "x", "y", model="vit_nano", image_size=64, patch_size=8, target="teacher", mine_every=2
    )
    architecture = resolve_model(config).with_target_dim(values)
    expected = learning + whole + decoder(64, 64, 1) / 2
    assert step_multiply_adds(architecture, config) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_view": "masked"},
        {"teacher_scale": 0.5},
        {"mine_every": 2},
        {"mine_by": "memory"},
    ],
)
def test_the_step_that_is_timed_is_the_one_that_is_counted(options, tmp_path):
    """The teacher runs in a timed turn as often as the miner of a training asks it."""
    config = BenchConfig(
        model="vit_nano", image_size=32, patch_size=8, batch_size=4, device="cpu", **options
    )
    state = bench.build_bench_run(config, {}, tmp_path / "run", torch.device("cpu"))
    calls = []
    state.miner.model.encoder.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    bench._run_turn(state, bench.noise_batch(state))
    state.log.close()
    expected = {"teacher_view": 2, "mine_by": 0}
    assert len(calls) == expected.get(next(iter(options), ""), 1)
    size = 16 if "teacher_scale" in options else 32
    assert all(images.shape[-1] == size for images, *_ in calls)


@pytest.mark.slow
def test_the_papers_sizes():
    """Per image: HPM about 2.3 times MAE (ViT-B/16, 224 px, ratio 0.75)."""
    hpm_config = PretrainConfig("x", "y", model="vit_base")
    mae_config = PretrainConfig("x", "y", model="vit_base", mask="random", predictor_loss="none")
    hpm, mae = (
        step_multiply_adds(resolve_model(config), config) for config in (hpm_config, mae_config)
    )
    assert mae == pytest.approx(29e9, rel=0.03) and hpm == pytest.approx(68e9, rel=0.03)


def test_bench_step(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "CPU_SIZE", 256)
    # Memory is measured in processes of their own, which a spawn would let import everything.
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: FORKS)
    result = run_here("bench", "step", *SMALL, "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr
    assert "HPM takes" in result.stdout and "teacher, ms" in result.stdout
    assert "images of" not in result.stderr, "no training is announced"
    report = json.loads((tmp_path / "b.json").read_text())
    for name, found in report["methods"].items():
        assert found["images_per_second"] > 0 and found["memory_gb"] > 0
        assert all(math.isfinite(ms) and ms >= 0 for ms in found["phases_ms"].values())
        teacher, forward = found["phases_ms"]["teacher"], found["phases_ms"]["forward"]
        assert (teacher > 0.05 * forward) == (name == "HPM")  # else but the two marks apart
        seconds = found["step_ms"] / 1e3
        rate = 2 * found["multiply_adds_per_image"] * 4 / seconds / 1e12
        assert found["tflops"] == pytest.approx(rate, rel=1e-6)


def test_the_options_of_a_run(tmp_path, monkeypatch):
    """Also those of channels that no built-in image has, and of data, weights and records, which a
    step does not need."""
    monkeypatch.setattr(timing, "CPU_SIZE", 256)
    monkeypatch.setattr(bench, "_peak_memory", lambda *_: dict.fromkeys(bench.METHODS, 0.0))
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: absent\nout: absent\nmodel: vit_tiny\nchannels: 12\nstream: true\ncache: true\n"
        "init: absent.pt\ninit_teacher: true\ninit_partial: true\nfreeze_encoder: 10%\n"
        "normalize: imagenet\ntracker: wandb\nprobe: absent\n"
    )
    result = run_here("bench", "step", "--config", file, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "vit_nano" in result.stdout, "the command line overrides the file"


def test_the_name_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    expected = {"cpu": ("CPU", None), "cuda": ("NVIDIA H100 80GB HBM3", 990.0)}
    for name, (chip, peak) in (expected | {"mps": ("Apple GPU", None)}).items():
        about = timing.about_device(torch.device(name), 1e12)
        assert (about["device"], about["peak_tflops"]) == (chip, peak)


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
    config = BenchConfig(
        model="vit_nano",
        image_size=32,
        patch_size=8,
        batch_size=4,
        repeats=2,
        steps_each=2,
        device="cpu",
    )
    for found in bench.bench_step(config)["methods"].values():
        assert found["step_ms"] == 1000 and found["step_ms_spread"] == 0


@pytest.mark.slow
def test_memory_is_that_of_a_method_alone(monkeypatch):
    monkeypatch.setattr(bench, "METHODS", {"HPM": {}})
    ballast = np.ones(2 * 10**8)  # 1.6 GB in this process
    config = BenchConfig(
        model="vit_nano",
        image_size=32,
        patch_size=8,
        batch_size=4,
        repeats=1,
        steps_each=1,
        device="cpu",
    )
    found = bench._peak_memory(config, torch.device("cpu"))
    assert 0.1 < found["HPM"] < ballast.nbytes / 1e9


def test_bad_benchmarks():
    assert_refused(run_here("bench"), "name a benchmark: hpm bench step|segment|detect|data")
    assert_refused(run_here("bench", "step", *SMALL, "--repeats=0"), "repeats")
    assert_refused(run_here("bench", "step", "--patch-size=15"), "patch_size 15 does not divide")


def test_what_the_script_for_a_gpu_names_is_there():
    named = re.findall(r"[\w/]+\.(?:py|md|png)\b", (ROOT / "benchmarks/gpu.sh").read_text())
    assert named and [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_the_script_for_a_gpu_runs(tmp_path):
    result = subprocess.run(
        ["bash", "benchmarks/gpu.sh"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"SMALL": "1", "OUT": str(tmp_path), "PYTHON": sys.executable},
    )
    assert result.returncode == 0 and "FAILED" not in result.stdout, result.stdout
    benchmark = json.loads((tmp_path / "small_eager.json").read_text())["methods"]["HPM"]
    # A real run, with held-out images, beside it; both speeds are printed.
    real = json.loads((tmp_path / "small_eager_run.json").read_text())
    assert real["steps"] == 20 and real["held_out"] == 8 and real["images_per_second"] > 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("real run")]
    for rate in (benchmark["images_per_second"], real["images_per_second"]):
        assert f"{rate:.1f} images/s" in line

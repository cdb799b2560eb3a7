"""A suggested command: it follows from images and machine, and it runs."""

import dataclasses
import json
import math
import shlex

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here, write_images
from PIL import Image

from hpm.commands import cli, plan_rules
from hpm.commands import plan as module
from hpm.commands.options import PlanConfig
from hpm.commands.plan import plan, run_name
from hpm.commands.plan_memory import estimate_memory
from hpm.commands.plan_rules import candidates, largest, recommended_epochs, training_images
from hpm.commands.plan_words import Plan
from hpm.core.config import PretrainConfig
from hpm.data import cache as caching
from hpm.data.survey import Survey
from hpm.models.architecture import resolve_model
from hpm.training.checks import check_pretrain
from hpm.training.pace import Pace
from hpm.training.trial import Timed


def seen(count, side=500, channels=3, unreadable=0):
    found = Survey("photos", count, 0, min(count or 1000, 1000), widths=[side], heights=[side])
    found.unreadable = [("one.jpg", "broken")] * unreadable
    found.view_channels = channels
    return found


def printed_command(text):
    """The words of the command on the screen, as a shell reads them."""
    _, _, after = text.partition("\ncommand\n")
    return shlex.split(after.partition("\n\n")[0].replace("\\\n", " "))


def options_of(words):
    assert words[0] == "hpm"
    options = cli.understand(words[1:])[1]
    assert isinstance(options, PretrainConfig)
    check_pretrain(options)
    return options


@pytest.fixture
def nano(monkeypatch):
    """The smallest model suits everything, so that the tests are fast."""
    monkeypatch.setattr(plan_rules, "MODELS", ("vit_nano",))
    monkeypatch.setattr(plan_rules, "MODEL_IMAGES", {})


@pytest.fixture
def machine(monkeypatch):
    """A machine of a given speed: FLOP/s that are reached in training."""

    def multiply_adds(architecture, config):
        patches = math.prod(architecture.image_size) / math.prod(architecture.patch_size)
        return 36 * architecture.depth * architecture.embed_dim**2 * patches

    def make(flops):
        def time_parts(config, device, parts, stop, limit):
            operations = 2 * config.batch_size * multiply_adds(resolve_model(config), config)
            config = dataclasses.replace(config, base_lr=0.0)
            return Timed(Pace(10, operations / flops, save=1), config, 3000)

        monkeypatch.setattr(module, "matrix_product_flops", lambda device: 2 * flops)
        monkeypatch.setattr(module, "step_multiply_adds", multiply_adds)
        monkeypatch.setattr(module, "time_parts", time_parts)

    return make


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (seen(300), ("vit_tiny", 224, 16, 64, 3)),
        (seen(5_000), ("vit_small", 224, 16, 128, 3)),
        (seen(1_000_000), ("vit_base", 224, 16, 256, 3)),
        (seen(None), ("vit_base", 224, 16, 256, 3)),
        (seen(50_000, side=32), ("vit_small", 32, 4, 256, 3)),
        (seen(50_000, side=64, channels=7), ("vit_small", 64, 8, 256, 7)),
        (seen(20), ("vit_tiny", 224, 16, 18, 3)),
    ],
)
def test_what_suits_the_images(found, expected):
    got = largest(found, frames=1)
    assert (got.model, got.image_size, got.patch_size, got.batch_size, got.channels) == expected
    for setting in candidates(got):
        check_pretrain(setting.config("photos", "run"))


def test_lengths():
    assert recommended_epochs(1_000_000, 256, frames=1) == 100
    assert recommended_epochs(5_000, 128, frames=1) == math.ceil(10_000 / 39)
    assert recommended_epochs(100, 64, frames=1) == 800
    assert training_images(seen(1000, unreadable=100)) == 900 - 90
    assert training_images(seen(100_000)) == 100_000 - 128


def test_the_command_on_the_screen_runs(image_folder, tmp_path, nano):
    result = run_here("plan", image_folder, "--gpu=h100", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80 or str(image_folder) in result.stdout
    assert "3 classes" in result.stdout and "no damaged files among all 48" in result.stdout
    assert "(estimated)" in result.stdout and "continues from other" in result.stdout
    # It is short because there are few images, and it is for a GPU already.
    assert "short training: more images" in " ".join(result.stdout.split())
    words = printed_command(result.stdout)
    options = options_of(words)
    assert (options.model, options.image_size, options.patch_size) == ("vit_nano", 32, 4)
    assert options.epochs == 800 and options.max_hours is None
    at = words.index("--epochs")
    words[at : at + 2] = ["--steps", "2", "--device", "cpu", "--workers", "0", "--holdout", "0"]
    trained = run_here(*words[1:])
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_less_time_makes_it_smaller(image_folder, tmp_path, machine):
    machine(flops=2e12)

    def suggested(**options) -> Plan:
        return plan(PlanConfig(str(image_folder), out=str(tmp_path / "run"), **options))

    long, short = suggested(hours=24.0), suggested(hours=0.05)
    assert long.setting.model == "vit_tiny" and "--epochs" in long.command
    assert long.seconds <= 24 * 3600 and not long.estimated
    machine(flops=5e9)
    slow = suggested(hours=1.0)
    assert slow.setting.model == "vit_nano" and slow.seconds <= 3600
    tiny = suggested(hours=0.01)
    assert options_of(tiny.command).max_hours == 0.01 and tiny.steps < tiny.recommended
    notes = " ".join(tiny.to_json()["notes"])
    assert tiny.seconds <= 36 and "short training: more time, or a GPU" in notes
    assert short.seconds <= 0.05 * 3600


def test_the_machine_on_macos(image_folder, tmp_path, nano, monkeypatch):
    """Without /proc, and on Apple's GPU, whose memory the driver limits."""
    monkeypatch.setattr(caching, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "matrix_product_flops", lambda device: 1e11)
    target = module._target(PlanConfig(str(image_folder), device="cpu"))
    assert target.title.endswith("no GPU") and target.memory > 0 and not target.on_gpu
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 10**9)
    target = module._target(PlanConfig(str(image_folder), device="mps"))
    assert target.title == "the Apple GPU of this machine"
    assert target.memory == 12e9 and target.on_gpu


def test_plain_values(image_folder, tmp_path, nano):
    file = tmp_path / "plan.json"
    result = run_here("plan", image_folder, "--gpu=a100", "--hours=2", "--json", file)
    content = json.loads(file.read_text())
    assert shlex.split(content["command"]) == printed_command(result.stdout)
    assert content["survey"]["widths"] == [20, 20, 20] and content["estimated"] is True
    assert content["memory_available_gb"] == 80 and content["reasons"]


def test_channels_copies_and_damaged_images(tmp_path, nano):
    rng = np.random.default_rng(0)
    for number in range(12):
        np.save(tmp_path / f"{number:02d}.npy", rng.integers(0, 255, (7, 40, 50), np.uint8))
    (tmp_path / "copy.npy").write_bytes((tmp_path / "00.npy").read_bytes())
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    made = plan(PlanConfig(str(tmp_path), gpu="l4"))
    assert options_of(made.command).channels == 7
    assert made.survey.duplicates == 1 and len(made.survey.unreadable) == 1
    notes = " ".join(made.to_json()["notes"])
    assert "broken.npy" in notes and "1 copy of other files" in notes


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("/home/me/Meine Fotos (Wiese) ä/", "Meine-Fotos-Wiese"),
        ("hf://user/food", "food"),
        ("shards/*.tar", "first"),
        ("写真", "first"),
    ],
)
def test_the_name_of_the_run(data, name):
    assert run_name(data) == name


def test_clips(tmp_path, nano):
    rng = np.random.default_rng(0)
    for video in range(6):
        (tmp_path / f"v{video}").mkdir()
        for frame in range(6):
            pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"v{video}" / f"{frame:03d}.png")
    made = plan(PlanConfig(str(tmp_path), gpu="h100", frames=4))
    options = options_of(made.command)
    assert (options.frames, options.patch_size, options.mask_ratio) == (4, (2, 4, 4), 0.9)
    assert "weights of VideoMAE" in " ".join(made.to_json()["notes"])


def test_streams(tmp_path, nano):
    from shards import write_shards

    write_shards(tmp_path)
    made = plan(PlanConfig(str(tmp_path / "*.tar"), gpu="h100"))
    assert made.survey.count is None and options_of(made.command).steps == 100_000


def test_memory_grows_with_what_is_trained():
    def memory(**options):
        config = PretrainConfig("photos", "run", **options)
        return estimate_memory(resolve_model(config), config, 4)

    nano = {"model": "vit_nano", "image_size": 32, "patch_size": 8}
    small, wide = memory(**nano), memory(**nano | {"model": "vit_tiny"})
    assert wide.fixed > small.fixed and wide.per_image > small.per_image > 0
    more = memory(**nano | {"image_size": 64})
    assert more.per_image > 3 * small.per_image and more.fixed < 1.01 * small.fixed
    assert small.total(10) == small.fixed + 10 * small.per_image


def test_batches_are_split_to_fit(monkeypatch):
    setting = largest(seen(1_000_000), frames=1)
    setting = next(s for s in candidates(setting) if s.model == "vit_tiny")
    config = setting.config("photos", "run", base_lr=0.0)
    choice = module.Choice(setting, Timed(Pace(0, 1), config, 1000), 10)

    def parts(gigabytes):
        target = module.Target("a GPU", torch.device("cpu"), None, 1e12, gigabytes * 1e9)
        return module._with_memory(choice, target).setting.accumulate

    assert parts(1000) == 1 and 1 < parts(6) < parts(3) <= 64


def test_mistakes(image_folder, tmp_path):
    assert_refused(run_here("plan", tmp_path / "no"), "no such folder")
    assert_refused(run_here("plan", image_folder, "--gpu=h10"), "did you mean 'h100'")
    assert_refused(run_here("plan", image_folder, "--hours=0"), "--hours is 0; it must be above 0")
    write_images(tmp_path / "bad", classes=1, per_class=2)
    for file in (tmp_path / "bad").rglob("*.png"):
        file.write_bytes(b"nothing")
    assert_refused(run_here("plan", tmp_path / "bad"), "none of the images can be read")

import dataclasses

import pytest
import torch

from hpm.core.config import PretrainConfig
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError
from hpm.core.options import make_config, preset_path, read_preset
from hpm.evals.contract import find, installed
from hpm.training.first_lines import few_images, few_steps, long_warmup
from hpm.training.optim import adamw, ema_decay, learning_rate, step_learning_rate
from hpm.training.schedule import (
    PAPER_BASE_LR,
    default_base_lr,
    make_schedule,
    resolve,
)

CPU = torch.device("cpu")


def schedule(num_images=1000, world_size=1, **options):
    config = PretrainConfig("demo", "out", **options)
    return make_schedule(resolve(config, num_images, CPU, world_size), num_images)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("40 epochs", 400),
        ("1 epoch", 10),
        ("0.5epochs", 5),
        ("500 steps", 500),
        ("1 step", 1),
        ("5%", 10),
        ("0.8 %", 1.6),
    ],
)
def test_durations(text, steps):
    assert duration_steps(text, total_steps=200, steps_per_epoch=10) == pytest.approx(steps)


@pytest.mark.parametrize("text", ["5", "", "five steps", "-5%", "5 minutes", "5%%"])
def test_no_durations(text):
    with pytest.raises(UserError, match="write '40 epochs', '500 steps' or '5%'"):
        duration_steps(text, 200, 10)


def test_the_papers_constants():
    """Decay 0.999 to 0.9999 over 100 epochs, lr 1.5e-4 x batch / 256, 40 epochs of warm-up."""
    options = read_preset("vit_base_in1k")
    config = make_config(PretrainConfig, options | {"data": "x", "out": "y"})
    paper = make_schedule(resolve(config, 1_281_167, CPU, 1), 1_281_167)
    assert paper.steps_per_epoch == 1_281_167 // config.batch_size
    assert paper.epochs == 200
    assert paper.peak_lr == pytest.approx(1.5e-4 * config.batch_size / 256)
    assert paper.warmup == 40 * paper.steps_per_epoch
    assert paper.ema_decay(0) == pytest.approx(0.999)
    assert paper.ema_decay(50 * paper.steps_per_epoch) == pytest.approx((0.999 + 0.9999) / 2)
    for epoch in (100, 199):
        assert paper.ema_decay(epoch * paper.steps_per_epoch) == pytest.approx(0.9999)


def test_every_preset_is_valid():
    from hpm.core.options import PRESETS
    from hpm.training.checks import check_pretrain

    presets = sorted(PRESETS.glob("*.yaml"))
    assert len(presets) >= 4
    for preset in presets:
        evaluation = preset.stem.partition("_")[0]
        if evaluation in installed():
            given = {"run": "x", "data": "y"} | read_preset(preset.stem)
            make_config(find(evaluation).options, given)
            continue
        options = {"data": "x", "out": "y"} | read_preset(preset.stem)
        check_pretrain(make_config(PretrainConfig, options))
        assert preset_path(preset.stem) == preset


def test_the_teacher_leaves_its_initialisation_on_small_data():
    """With the defaults the average of 500 steps keeps little of where it began."""
    small = schedule(num_images=640, batch_size=64, epochs=50)
    kept = 1.0
    for step in range(small.total):
        kept *= small.ema_decay(step)
    assert kept < 1e-3
    paper_constants = 1.0
    for step in range(small.total):
        paper_constants *= ema_decay(step, 1000, 10000, 50 * 10)
    assert paper_constants > 0.5


def test_steps_or_epochs():
    assert schedule(batch_size=100, epochs=7).total == 70
    half = schedule(batch_size=100, steps=25)
    assert half.total == 25 and half.epochs == 2.5
    assert [half.epoch(step) for step in (0, 9, 10, 24)] == [0, 0, 1, 2]


def test_batch_size_is_global_and_defaults_to_what_there_is():
    assert schedule(num_images=1000, base_lr=1.5e-4).peak_lr == pytest.approx(1.5e-4)
    config = PretrainConfig("demo", "out")
    assert resolve(config, 100, CPU, 1).batch_size == 100
    assert resolve(config, 101, CPU, 2).batch_size == 100
    one = schedule(batch_size=64)
    assert one == schedule(batch_size=64, world_size=4)
    with pytest.raises(UserError, match="smaller --batch-size"):
        resolve(dataclasses.replace(config, batch_size=101), 100, CPU, 1)
    with pytest.raises(UserError, match="multiple of 3"):
        resolve(dataclasses.replace(config, batch_size=64), 100, CPU, 3)


def test_learning_rate_is_continuous_and_ends_at_zero():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == 0 and rates[10] == 1 and rates[100] == pytest.approx(0, abs=1e-12)
    assert max(abs(a - b) for a, b in zip(rates, rates[1:], strict=False)) <= 0.1 + 1e-9
    assert learning_rate(0, 100, 0, 1.0) == 1.0


def test_weight_decay_spares_one_dimensional_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, spared = adamw(model, 1e-3, (0.9, 0.95), 0.05).param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.05
    assert [p.ndim for p in spared["params"]] == [1, 1, 1] and spared["weight_decay"] == 0


def test_the_hard_share_moves_at_every_step():
    """Also where training is shorter than an epoch, or has two."""
    short = schedule(1000, batch_size=10, steps=50)
    assert short.hard_share_progress(0) == pytest.approx(1 / 50)
    assert short.hard_share_progress(24) == pytest.approx(0.5)
    assert short.hard_share_progress(49) == 1
    two_epochs = schedule(100, batch_size=10, epochs=2)
    shares = [two_epochs.hard_share_progress(step) for step in range(20)]
    assert shares == pytest.approx([(step + 1) / 20 for step in range(20)])


def test_the_papers_hard_share_moves_once_an_epoch():
    options = read_preset("vit_base_in1k")
    config = make_config(PretrainConfig, options | {"data": "x", "out": "y"})
    paper = make_schedule(resolve(config, 1_281_167, CPU, 1), 1_281_167)
    per_epoch = paper.steps_per_epoch
    for epoch in (0, 99, 199):
        first, last = epoch * per_epoch, (epoch + 1) * per_epoch - 1
        assert paper.hard_share_progress(first) == paper.hard_share_progress(last)
        assert paper.hard_share_progress(first) == pytest.approx((epoch + 1) / 200)


@pytest.mark.parametrize(
    ("warmup", "epochs", "expected"),
    [("10%", 105, 50), ("10%", 110, 100), ("40 epochs", 130, 1500), ("2 steps", 101, 2)],
)
def test_a_prolonged_run_warms_up_within_the_added_steps(warmup, epochs, expected):
    """And then its rate falls to 0 again, however few steps are added."""
    config = PretrainConfig("demo", "out", batch_size=64, warmup=warmup, epochs=epochs)
    prolonged = make_schedule(resolve(config, 6400, CPU, 1), 6400, start=10_000)
    assert prolonged.warmup == expected
    rates = [prolonged.learning_rate(step) for step in range(10_000, prolonged.total)]
    assert rates[0] == 0 and max(rates) == pytest.approx(prolonged.peak_lr)
    assert rates[-1] < 0.01 * prolonged.peak_lr


def test_a_warm_up_that_takes_the_whole_training_is_said():
    assert long_warmup("10%", 10, 100) == long_warmup("5 epochs", 99, 100) == []
    assert long_warmup("100%", 100, 100)
    (line,) = long_warmup("40 epochs", 400, 100)
    assert "of 40 epochs takes 400 steps, but the training has 100" in line


def test_few_images_are_said():
    (line,) = few_images(1)
    assert "there is 1 image to train on" in line
    assert "there are 9 images to train on" in few_images(9)[0]
    assert few_images(10) == []


def test_the_learning_rate_falls_in_steps():
    """ViTDet's: 0.001 of the peak, 250 steps of warm-up, a tenth at each milestone."""

    def rate(step):
        return step_learning_rate(step, 250, 1e-4, [163_889, 177_546], 0.1)

    assert rate(0) == pytest.approx(1e-7)
    assert rate(125) == pytest.approx(1e-4 * (0.001 + 0.999 / 2))
    assert rate(250) == rate(163_888) == 1e-4
    assert rate(163_889) == pytest.approx(1e-5) == rate(177_545)
    assert rate(177_546) == pytest.approx(1e-6) == rate(184_374)
    assert step_learning_rate(0, 0, 1.0, [], 0.5) == 1


def test_the_default_learning_rate_follows_the_number_of_steps():
    lengths = [1, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000]
    rates = [default_base_lr(steps, 64) for steps in lengths]
    assert rates == sorted(rates, reverse=True)
    assert rates[3:6] == [8e-3, 4.7e-3, 2.1e-3]
    assert rates[-2:] == [PAPER_BASE_LR, PAPER_BASE_LR]
    for batch_size in (8, 256, 4096):
        for steps in lengths:
            base_lr = default_base_lr(steps, batch_size)
            # The peak is not above what was measured, unless the paper's own is.
            assert base_lr >= PAPER_BASE_LR
            assert base_lr * batch_size / 256 <= max(2e-3, PAPER_BASE_LR * batch_size / 256) * 1.05

    def resolved(**options):
        config = PretrainConfig("photos", "out", batch_size=64, **options)
        return resolve(config, 3457, CPU, 1)

    assert resolved(steps=300).base_lr == default_base_lr(300, 64)
    assert resolved(epochs=20).base_lr == default_base_lr(20 * 54, 64)
    assert resolved(steps=300, base_lr=1.5e-4).base_lr == 1.5e-4
    assert resolved(steps=300).peak_lr == pytest.approx(2e-3)


@pytest.mark.parametrize("name", ["vit_base_in1k", "vit_base_in1k_800", "vit_large_in1k_800"])
def test_the_papers_presets_have_its_learning_rate_whatever_the_length(name):
    options = read_preset(name) | {"data": "x", "out": "y", "epochs": 1}
    assert resolve(make_config(PretrainConfig, options), 1_281_167, CPU, 1).base_lr == 1.5e-4


def test_a_short_training_is_said_with_what_to_change():
    def lines(num_images=3457, data="photos", **options):
        config = PretrainConfig(data, "out", batch_size=64, **options)
        config = resolve(config, num_images, CPU, 1)
        return few_steps(config, make_schedule(config, num_images).total, num_images)

    (line,) = lines(epochs=10)
    assert "540 steps is a short training" in line and "smaller --batch-size" in line
    assert "--epochs 38" in line and 37 * 54 < 2000 <= 38 * 54
    assert lines(epochs=38) == []
    (line,) = lines(steps=1)
    assert "1 step is a short training" in line and line.endswith("pass --steps 2000")
    assert lines(steps=1000, data="demo") == []

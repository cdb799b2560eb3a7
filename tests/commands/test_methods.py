"""Does mining help? Four methods at equal time."""

import contextlib
import csv
import dataclasses
import io
import json
import re

import pytest
from fake_gpu import fake_gpu
from helpers import TINY, assert_refused, run_here, tiny_arguments
from rich.console import Console

import hpm
from hpm.commands import methods as module
from hpm.commands.ablation_plan import ARMS, Variant
from hpm.commands.ablation_results import print_results
from hpm.commands.methods import equal_time, methods
from hpm.commands.methods_results import MethodsResults
from hpm.commands.options import MethodsConfig
from hpm.core.config import PretrainConfig
from hpm.core.options import make_config
from hpm.core.signals import Stop
from hpm.training import trial
from hpm.training.length import RESERVE
from hpm.training.pace import Pace
from hpm.training.trial import Timed

STEP = {"mae": 1.0, "predictor": 1.5, "hpm": 2.0, "hpm_memory": 1.0}


def timed(**length):
    config = PretrainConfig("photos", "run", batch_size=10, base_lr=0.0, **length)
    return {name: Timed(Pace(30, step, evaluation=3), config, 100) for name, step in STEP.items()}


def config_of(data, out, **options):
    return make_config(MethodsConfig, TINY | {"data": str(data), "out": str(out)} | options)


def results_of(folder, **linear):
    """One number for each seed of each arm."""
    results = MethodsResults(folder, [Variant({"arm": name}, ARMS[name]) for name in ARMS])
    for variant in results.variants:
        for seed, value in enumerate(linear[str(variant)]):
            results.add(variant, seed, {"linear": value, "knn": value / 2, "minutes": 1.0})
    return results


def test_equal_time(tmp_path):
    """Of the steps; what else takes time is the same for all."""
    config = config_of("photos", tmp_path, steps=50)
    found = equal_time(timed(steps=50), config)
    assert found == {"mae": 100, "predictor": 66, "hpm": 50, "hpm_memory": 100}
    found = equal_time(timed(epochs=4), config_of("photos", tmp_path, steps=None, epochs=4))
    assert found["hpm"] == 40 and found["mae"] == 80


def test_what_the_methods_set_is_not_used(image_folder, tmp_path):
    options = ["--mask=random", "--predictor-loss=none", "--image-size=17"]
    result = run_here("methods", image_folder, "--out", tmp_path / "m", *options)
    assert "mask random is not used: each method has its own" in result.stderr
    assert "predictor_loss none is not used" in result.stderr


def test_hours_of_each_run(tmp_path):
    config = config_of("photos", tmp_path, steps=None, max_hours=1.0)
    times = timed()
    for name, steps in equal_time(times, config).items():
        limit = (1 - RESERVE) * 3600
        assert times[name].seconds(steps) <= limit < times[name].seconds(steps + 1)
    with pytest.raises(hpm.UserError, match="too short for .*a step takes"):
        equal_time(times, config_of("photos", tmp_path, steps=None, max_hours=0.001))


def test_a_clear_difference(tmp_path):
    base = (30.0, 31.0, 29.0)
    better = [value + gain for value, gain in zip(base, (2.0, 2.2, 1.9), strict=True)]
    noise = [value + gain for value, gain in zip(base, (1.0, -1.5, 0.2), strict=True)]
    results = results_of(tmp_path, mae=base, predictor=base, hpm=better, hpm_memory=noise)
    text = results.summary()
    assert text.startswith("At equal time, over 3 seeds: HPM is better than MAE (+2.0 ± 0.4 points")
    assert "HPM by memory does not differ significantly from MAE (-0.1 ± 3.2 points" in text
    assert "of about 4.0 points would have been detected with a probability of 80 %" in text
    worse = results_of(tmp_path, mae=better, predictor=base, hpm=base, hpm_memory=base)
    assert "HPM is worse than MAE (-2.0 ± 0.4" in worse.summary()
    means, less = results.tables()
    assert [row[0] for row in means.rows] == list(ARMS)
    assert less.rows[1][0] == "HPM minus MAE" and "+2.0 ± 0.4" in less.rows[1]
    assert less.rows[3][0] == "HPM minus predictor's loss"
    results.write()
    assert (tmp_path / "methods.md").read_text().startswith(text)
    assert (tmp_path / "methods.png").stat().st_size > 5000


def test_differences_that_are_all_alike_have_no_interval(tmp_path):
    base = (30.0, 31.0, 29.0)
    same = [value + 5 for value in base]
    results = results_of(tmp_path, mae=base, predictor=base, hpm=same, hpm_memory=base)
    assert "± 0" not in results.tables()[1].rows[1] and "+5.0" in results.tables()[1].rows[1]
    results.write()


def test_a_narrow_screen(tmp_path):
    """No name or number is cut or wrapped: columns that do not fit stand in a table below."""
    base = (30.0, 31.0, 29.0)
    other = (31.0, 31.5, 30.5)
    results = results_of(tmp_path, mae=base, predictor=other, hpm=other, hpm_memory=base)
    screen = Console(width=45, force_terminal=True, no_color=True, file=io.StringIO())
    print_results(results, screen)
    lines = re.sub(r"\x1b\[\d*m", "", screen.file.getvalue()).splitlines()
    cells = [cell for table in results.tables() for row in table.rows for cell in row if cell]
    assert all(any(cell in line for line in lines) for cell in cells)
    assert max(map(len, lines)) <= 60
    assert sum("predictor's loss minus MAE" in line for line in lines) >= 2


def test_one_seed_says_nothing(tmp_path):
    one = results_of(tmp_path, mae=[30], predictor=[31], hpm=[32], hpm_memory=[29])
    assert "HPM minus MAE is +2.0 points of linear probe, but one seed cannot say" in one.summary()
    one.write()  # with a figure without intervals


def test_seeds_that_differ_alike(tmp_path):
    base, better = (30.0, 35.0), (35.0, 40.0)
    text = results_of(tmp_path, mae=base, predictor=base, hpm=better, hpm_memory=base).summary()
    assert "HPM minus MAE is +5.0 points of linear probe with each seed; differences that" in text
    assert "HPM by memory minus MAE is +0.0 points" in text
    assert "better than" not in text and "80 %" not in text


def test_the_steps_are_kept(tmp_path, monkeypatch):
    """A comparison that goes on does not time again, and refuses other options."""
    ran = []
    monkeypatch.setattr(module, "time_methods", lambda configs, stop: timed(steps=50))
    monkeypatch.setattr(module, "train_and_measure", lambda config, runs, results: ran.append(runs))
    options = {"steps": 50, "seeds": 2}
    methods(config_of("photos", tmp_path / "m", **options))
    assert [(str(run.variant), run.config.steps) for run in ran[0][:4]] == [
        ("mae", 100),
        ("predictor", 66),
        ("hpm", 50),
        ("hpm_memory", 100),
    ]
    assert len(ran[0]) == 8 and len({run.config.out for run in ran[0]}) == 8
    kept = json.loads((tmp_path / "m" / "times.json").read_text())
    assert kept["seconds"]["hpm"]["step"] == 2.0
    monkeypatch.setattr(module, "time_methods", None)
    methods(config_of("photos", tmp_path / "m", **options | {"seeds": 3}))
    assert len(ran[1]) == 12
    with pytest.raises(hpm.UserError, match="another comparison: there steps is 50, here 60"):
        methods(config_of("photos", tmp_path / "m", **options | {"steps": 60}))


@pytest.mark.parametrize(("machine", "at_once"), [("cpu", 2), ("cuda", 1)])
def test_a_gpu_holds_one_method_at_a_time(machine, at_once, image_folder, tmp_path, monkeypatch):
    held, most = 0, 0

    @contextlib.contextmanager
    def counted(*arguments):
        nonlocal held, most
        with trial.trial_of(*arguments) as timed_trial:
            held += 1
            most = max(most, held)
            yield timed_trial
            held -= 1

    monkeypatch.setattr(module, "trial_of", counted)
    evaluations = iter((3.0, 5.0))
    pace = Pace(startup=1, step=1)
    monkeypatch.setattr(
        module,
        "measure_pace",
        lambda *_: dataclasses.replace(pace, evaluation=next(evaluations)),
    )
    monkeypatch.setattr(module, "_round", lambda timed_trial: 0.5)
    options = TINY | {"device": machine, "compile": "false", "holdout": 4}
    configs = {
        name: PretrainConfig(str(image_folder), str(tmp_path / name), **options)
        for name in ("mae", "hpm")
    }
    with fake_gpu() if machine == "cuda" else contextlib.nullcontext():
        times = module.time_methods(configs, Stop())
    assert most == at_once
    assert [timed.pace.step for timed in times.values()] == [0.5, 0.5]
    assert times["mae"].pace.evaluation == times["hpm"].pace.evaluation == 4  # the median of both


def test_mistakes(image_folder, tmp_path):
    result = run_here("methods", image_folder, "--out", tmp_path / "m", "--mask-ratio=0.999")
    assert_refused(result, "4 of 4 combinations cannot be run")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def timed_briefly(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(trial, "MOST", trial.FEWEST)


@pytest.mark.slow
def test_a_whole_comparison(image_folder, tmp_path, timed_briefly):
    arguments = ["methods", image_folder, "--seeds=2", "--out", tmp_path / "m"]
    arguments += tiny_arguments(steps=3, holdout=4)
    result = run_here(*arguments)
    assert result.returncode == 0, result.stderr
    assert "At equal time, over 2 seeds: HPM" in result.stdout and "|" not in result.stdout
    rows = list(csv.DictReader((tmp_path / "m" / "methods.csv").open()))
    assert [row["arm"] for row in rows] == [name for name in ARMS for _ in range(2)]
    assert (tmp_path / "m" / "compare.html").exists()
    again = run_here(*arguments)
    assert again.stdout == result.stdout and "timing" not in again.stderr


@pytest.mark.slow
def test_without_labels(image_folder, tmp_path, timed_briefly):
    arguments = ["methods", image_folder / "class_0", "--seeds=1", "--out", tmp_path / "m"]
    result = run_here(*arguments, *tiny_arguments(steps=3))
    assert result.returncode == 0, result.stderr
    assert "Without labels, this comparison cannot say whether mining helps." in result.stdout

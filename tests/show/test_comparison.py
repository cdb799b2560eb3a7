"""The page of a comparison: which runs it reads, what it says of them, and that it sorts."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import TINY, assert_refused, run_here

import hpm
from hpm.core.config import PretrainConfig
from hpm.show.compared import differing_options, read_runs
from hpm.show.comparison import compare
from hpm.show.options import CompareConfig
from hpm.training.resume import config_text


@pytest.fixture(scope="module")
def runs(finished_run, image_folder, tmp_path_factory):
    """A folder with two runs: HPM with an evaluation, and MAE."""
    folder = tmp_path_factory.mktemp("compared")
    # Other tests evaluate this run, too.
    without = shutil.ignore_patterns("evals")
    shutil.copytree(finished_run.folder, folder / "hpm" / "seed_0", ignore=without)
    options = TINY | {"mask": "random", "predictor_loss": "none", "mask_ratio": 0.5, "steps": 2}
    hpm.pretrain(str(image_folder), str(folder / "mae" / "seed_0"), **options)
    for name, top1 in (("hpm", 61.5), ("mae", 42.5)):
        below = folder / name / "seed_0" / "evals"
        below.mkdir()
        numbers = {"top1": top1, "top1_low": top1 - 2, "top1_high": top1 + 2}
        values = {"trained, patch mean": {"k = 5": numbers}, "raw pixels": {"k = 5": {"top1": 50}}}
        values["raw pixels"]["k = 5"] |= {"top1_low": 48, "top1_high": 52}
        result = {"protocol": "knn", "values": values, "hardness": {}}
        about = {"data": "flowers", "weights": "student", "step": 8, "run": "r"}
        (below / "knn.json").write_text(json.dumps(result | {"about": about}))
    return folder


@pytest.fixture(scope="module")
def html(runs):
    out = runs / "compare.html"
    found = run_here("compare", runs / "hpm", runs / "mae", "--out", out, "--images", 3)
    assert found.returncode == 0, found.stderr
    return out


def test_the_page_says_what_differs(html):
    text = html.read_text()
    assert "<h1>2 runs</h1>" in text and "hpm/seed_0" in text and "mae/seed_0" in text
    options = text.partition("Options that differ")[2].partition("<h2>")[0]
    heads = re.findall(r'data-key="\d+">([^<]+)<', options)
    assert heads[0] == "name" and {"mask", "mask_ratio", "predictor_loss", "steps"} <= set(heads)
    assert not {"out", "data", "model", "seed"} & set(heads)
    assert "Losses do not compare: the runs differ in mask_ratio" in text
    assert text.count('class="measured') == 2 and "<b>61.5</b> (59.5 to 63.5)" in text
    assert "Line: raw pixels, 50.0." in text
    loss = re.search(r"<h3>Reconstruction loss, training</h3>.*?</figure>", text)[0]
    assert 'class="curve c0"' in loss and 'class="curve c1"' in loss
    ranking = re.search(r"<h3>Predictor loss</h3>.*?</figure>", text)[0]
    assert "0.693 is chance" in ranking, "of the only run that has a predictor"
    assert 'class="curve c0"' in ranking and 'class="curve c1"' not in ranking
    assert text.count('class="view map actual"') == 2 * 3
    assert text.count('class="view map predicted"') == 3
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_an_option_that_follows_equals_the_same_one_given(tmp_path):
    folders = []
    for name, given in (("a", {}), ("b", {"hard_share_end": 0.5})):
        config = PretrainConfig("photos", "out", **given)
        resolved = replace(config, hard_share_end=0.5, base_lr=1e-3 if given else 2e-3)
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.yaml").write_text(config_text(config, resolved))
    assert list(differing_options(read_runs(list(map(str, folders))))) == ["base_lr"]


def test_losses_of_tubes_do_not_compare_with_those_of_patches(tmp_path):
    def said(name, **options):
        """What a page of two runs on clips says, of which the second has other options."""
        folders = [str(tmp_path / name / each) for each in "ab"]
        for folder, own in zip(folders, ({}, options)):
            Path(folder).mkdir(parents=True)
            content = {"data": "videos", "frames": 8, "mask": "random"} | own
            Path(folder, "config.yaml").write_text(yaml.safe_dump(content))
            Path(folder, "metrics.jsonl").write_text('{"step": 1, "reconstruction_loss": 1.0}\n')
        page = compare(CompareConfig(tuple(folders), str(tmp_path / f"{name}.html"), images=0))
        return "".join(re.findall(r'<p class="warning">(Losses.*?)</p>', page.read_text()))

    words = "Losses do not compare: the runs differ in "
    assert said("a", mask="hpm") == ""
    assert said("b", mask="tube") == words + "mask."
    assert said("c", mine_tubes="mean", mask="hpm") == words + "mask, mine_tubes."
    assert said("d", frame_stride=1) == words + "frame_stride."


def test_numbers_that_are_not_finite_are_shown(tmp_path):
    """A diverged loss, or the ranking accuracy of images without patches to compare."""
    folders = [str(tmp_path / each) for each in "ab"]
    for folder, value in zip(folders, (0.5, math.nan)):
        Path(folder, "evals").mkdir(parents=True)
        Path(folder, "config.yaml").write_text(yaml.safe_dump({"data": "photos"}))
        line = {"step": 1, "reconstruction_loss": value, "held_out/ranking_accuracy": value}
        Path(folder, "metrics.jsonl").write_text(json.dumps(line) + "\n")
        values = {"trained, patch mean": {"stats": {"rank": value}}}
        result = {"protocol": "stats", "values": values, "hardness": {"ranking_accuracy": value}}
        result["about"] = {"data": "photos", "weights": "student", "step": 1, "run": "r"}
        Path(folder, "evals", "stats.json").write_text(json.dumps(result))
    page = compare(CompareConfig(tuple(folders), str(tmp_path / "page.html"), images=0))
    text = page.read_text()
    keys = json.loads(re.search(r'id="keys">(.*?)</script>', text)[1])
    assert keys.count([0.5, None]) == 4
    assert "<td>nan</td>" in text and "<b>nan</b>" in text and "left:nan" not in text


def test_a_browser_sorts_and_hides(screens, html):
    for shown in screens(html):
        rows = shown.locator(".compared tbody").first.locator("tr")
        shown.select_option("#sort", label="kNN, k = 5 on flowers, patch mean: top-1, %")
        assert "mae" in rows.first.text_content()
        assert "mae" in shown.locator(".measured").first.text_content()
        shown.click("#turn")
        assert "hpm" in rows.first.text_content()
        shown.locator(".sorter", has_text="mask_ratio").click()
        assert "mae" in rows.first.text_content()
        assert shown.locator(".moments .bar i").first.bounding_box()["width"] > 10
        shown.locator(".chip").first.click()
        assert shown.locator('[data-run="0"]:visible').count() == 0
        assert shown.locator(".chart .key.c0:visible").count() == 0
        assert shown.locator('[data-run="1"]:visible').count() > 0


def test_what_cannot_be_drawn_is_said(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    shutil.rmtree(folder / "mae" / "seed_0" / "checkpoints")
    file = folder / "hpm" / "seed_0" / "config.yaml"
    options = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(options | {"data": "/gone"}))
    out = tmp_path / "page.html"
    assert run_here("compare", folder, "--out", out).returncode == 0
    text = out.read_text()
    assert "Not drawn: hpm/seed_0: /gone" in text and "mae/seed_0: it has a backbone only" in text
    assert run_here("compare", folder, "--out", out, "--images", 0).returncode == 0
    assert "The same images" not in out.read_text()


def test_refusals(runs, image_folder, tmp_path):
    one = runs / "hpm" / "seed_0"
    for words, arguments in (
        ("RUNS must be given", ()),
        ("no such folder", (one, tmp_path / "missing")),
        ("name at least two runs", (one, image_folder)),
        ("name at least two runs", (one, one)),
        ("none of these folders is one", (image_folder,)),
        ("name a .html file", (runs, "--out", tmp_path / "page.png")),
        ("--images is 100", (runs, "--images", 100)),
    ):
        assert_refused(run_here("compare", *arguments), words)
    assert "RUNS ..." in run_here("compare", "--help").stdout


def test_other_data_of_the_same_name_is_another_measure(tmp_path):
    """Folders named `images`, or files `train.parquet`, are common."""
    folders = [tmp_path / each for each in "ab"]
    for folder, data in zip(folders, ("cub/images", "pets/images"), strict=True):
        (folder / "evals").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": "photos"}))
        values = {"trained, patch mean": {"linear": {"top1": 50.0}}}
        result = {"protocol": "linear", "values": values, "hardness": {}}
        result["about"] = {"data": data, "weights": "student", "step": 1, "run": "r"}
        (folder / "evals" / "linear.json").write_text(json.dumps(result))
    titles = [measure.title for run in read_runs([str(tmp_path)]) for measure in run.measures()]
    assert titles == [
        "linear probe on cub/images, patch mean",
        "linear probe on pets/images, patch mean",
    ]

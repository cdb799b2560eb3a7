"""A run in Python: what it says of itself, its curves, and images through its weights."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import hpm
from hpm.show import run as shown


def size_of(drawing):
    return Image.open(io.BytesIO(drawing._repr_png_())).size


@pytest.fixture
def run(finished_run):
    return hpm.Run(str(finished_run.folder))


def test_it_says_how_it_went(run):
    assert (run.status.state, run.status.step, run.status.total) == ("finished", 8, 8)
    assert run.judgement.startswith("Loss 1.")
    html = run._repr_html_()
    assert "step 8 of 8, finished" in html and run.judgement[:20] in html
    assert str(run.report) in html


def test_curves_are_those_of_the_log(run):
    axes = run.plot().figure.axes
    assert [axis.get_title() for axis in axes] == ["Reconstruction loss", "Ranking accuracy"]
    logged = [m for m in run.metrics() if "reconstruction_loss" in m]
    steps, values = axes[0].lines[0].get_data()
    assert list(steps) == [m["step"] for m in logged]
    assert list(values) == [m["reconstruction_loss"] for m in logged]
    (only,) = run.plot("learning_rate").figure.axes
    assert only.get_title() == "Learning rate"
    with pytest.raises(hpm.UserError, match="no metric 'learning_rat'.*learning_rate"):
        run.plot("learning_rat")


def test_images_by_name_and_by_hand(run, image_folder, tmp_path):
    files = sorted(image_folder.rglob("*.png"))[:2]
    array = np.asarray(Image.open(files[0]).convert("RGB"))
    by_hand = run.show([files[0], str(files[1]), Image.open(files[0]), array], ("image", "mask"))
    shown = [axis.images[0].get_array() for axis in by_hand.figure.axes if axis.images]
    assert len(shown) == 8
    assert np.array_equal(shown[0], shown[4]) and np.array_equal(shown[0], shown[6])
    assert not np.array_equal(shown[0], shown[2])
    named = run.show(image_folder, count=2, panels=("image", "actual", "predicted"))
    width, height = size_of(named)
    assert width > height
    assert named.save(tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        ([], {}, "no pictures to show"),
        (["/nowhere/a.png"], {}, "/nowhere/a.png cannot be used"),
        ([np.zeros((3, 16, 16), np.float32)], {}, "picture 0 cannot be used"),
        ("/nowhere", {}, "nowhere"),
        ("demo", {"count": 101}, "at most 100"),
        ("demo", {"mask_ratio": 2.0}, "mask_ratio"),
    ],
)
def test_what_cannot_be_shown_is_refused(run, images, options, words):
    with pytest.raises(hpm.UserError, match=re.escape(words)):
        run.show(images, **options)


def test_a_folder_without_a_run(tmp_path):
    empty = hpm.Run(tmp_path)
    assert empty._repr_html_() is None
    for ask in (empty.plot, lambda: empty.status, lambda: empty.judgement):
        with pytest.raises(hpm.UserError, match="no run folder"):
            ask()


def test_a_run_stands_for_its_folder(run, image_folder):
    options = {"k": (1,), "workers": 0, "baselines": False}
    result = hpm.evaluate("knn", run, image_folder, **options)
    assert result.about["run"] == str(run.folder)
    assert hpm.load_encoder(run).encoder.num_patches == 16
    features = hpm.embed(run, image_folder, workers=0)
    found = hpm.cluster(features, 2)
    assert sum(len(found.members(n)) for n in range(len(found))) == len(features)
    assert np.bincount(found.numbers).tolist() == sorted(np.bincount(found.numbers), reverse=True)
    assert len(found.show(3).figure.axes) == len(found) and size_of(found.map())[0] > 100
    assert str(len(found.members(0))) in repr(found)


def test_a_result_is_a_table_without_control_characters(run, image_folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a kernel
    result = hpm.evaluate("hardness", run, image_folder, workers=0)
    result.values = {"trained <b>": {"hardness": {"rank": 0.25}}}
    html = result._repr_html_()
    assert "<td>0.25</td>" in html and "trained &lt;b&gt;" in html
    assert "ranking accuracy" in html and "0.5 is chance" in html
    assert "\x1b" not in html + str(result)
    json.dumps(html)


def test_a_notebook_reads_the_log_once(run, monkeypatch):
    """That of a long run takes seconds."""
    read, real = [], shown.read_metrics
    monkeypatch.setattr(shown, "read_metrics", lambda folder: read.append(folder) or real(folder))
    assert "Loss 1." in run._repr_html_() and len(read) == 1
    assert run.judgement and len(read) == 2

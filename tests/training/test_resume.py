"""A run goes on with what it began with, however that is written; with nothing else."""

import shutil

import pytest
import torch
from helpers import TINY, stop_after, write_images

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.files import read_tensors, write_tensors
from hpm.core.options import make_config
from hpm.show.run import Run
from hpm.training.build import build_run

OPTIONS = TINY | {"holdout": 0, "init": "first/backbone.safetensors"}


@pytest.fixture(scope="module")
def begun(finished_run, tmp_path_factory):
    """A folder with images and a run on them that stopped at step 4."""
    folder = tmp_path_factory.mktemp("begun")
    write_images(folder / "photos", per_class=8)
    shutil.copytree(finished_run.folder, folder / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(data="photos", out="run", init_partial=True, **OPTIONS)
    return folder


@pytest.fixture
def here(begun, tmp_path, monkeypatch):
    """A copy of it, which the test is in."""
    folder = shutil.copytree(begun, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


def go_on(**changes):
    options = {"data": "photos", "out": "run", "init_partial": True} | OPTIONS | changes
    return build_run(make_config(PretrainConfig, options), torch.device("cpu")).step


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "photos/"},
        {"data": "./photos"},
        {"data": "../here/photos"},
        {"image_size": [16, 16], "patch_size": [4, 4]},
        {"init": "./first//backbone.safetensors"},
        {"flip": "horizontal"},
        {"warmup": " 10.0 %", "ema_ramp": "4 steps"},
        {"epochs": 5},  # of no effect beside steps
        {"secondary_mask_ratio": 0, "mask_ratio": 0.75, "hard_share_end": 0.5},
        {"out": "./run/"},
    ],
)
def test_the_same_in_other_words_goes_on(here, changes):
    assert go_on(**changes) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": (16, 20)}, r"there image_size is 16, here \[16, 20\]"),
        ({"warmup": "20%"}, "there warmup is 10%, here 20%"),
        ({"flip": False}, "there flip is True, here False"),
        ({"init": "run"}, "there init is first/backbone.safetensors, here run"),
        ({"steps": 9}, "there steps is 8, here 9; finish it first, at step 8"),
        ({"steps": 7}, "there steps is 8, here 7; choose another"),
    ],
)
def test_something_else_does_not(here, changes, words):
    with pytest.raises(hpm.UserError, match=f"holds another run: {words}.*--init run"):
        go_on(**changes)


def test_epochs_that_are_as_many_steps(tmp_path, monkeypatch):
    images = write_images(tmp_path / "photos", per_class=8)
    given = TINY | {"data": str(images), "out": str(tmp_path / "run"), "holdout": 0}
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        hpm.pretrain(**given | {"steps": 6})
    del given["steps"]
    assert (
        build_run(make_config(PretrainConfig, given | {"epochs": 2}), torch.device("cpu")).step == 4
    )
    with pytest.raises(hpm.UserError, match="holds another run"):
        build_run(make_config(PretrainConfig, given | {"epochs": 3}), torch.device("cpu"))


def test_data_that_moved(here):
    (here / "photos").rename(here / "pictures")
    assert go_on(data="pictures") == 4


@pytest.mark.parametrize("kind", ["replaced", "renamed", "another folder"])
def test_data_that_are_others(here, kind):
    image, data = here / "photos" / "class_0" / "000.png", "photos"
    if kind == "replaced":
        image.write_bytes((here / "photos" / "class_1" / "000.png").read_bytes() + b"0")
    elif kind == "renamed":
        image.rename(image.with_name("900.png"))
    else:
        data = str(write_images(here / "others", classes=2, per_class=12))
    with pytest.raises(hpm.UserError, match=f"{data} holds other images than the run in run") as e:
        go_on(data=data)
    assert "\n" not in str(e.value) and "put the data back" in str(e.value)


def test_deleted_images(here):
    (here / "photos" / "class_0" / "000.png").unlink()
    with pytest.raises(hpm.UserError, match="23 training images, but the run began with 24"):
        go_on()


def test_a_run_of_before_fingerprints_goes_on_as_it_did(here):
    path = Run(here / "run").latest_checkpoint()
    tensors, meta = read_tensors(path)
    assert meta.pop("fingerprint")
    write_tensors(path, tensors, meta)
    (here / "photos" / "class_0" / "000.png").write_bytes(
        (here / "photos" / "class_1" / "000.png").read_bytes()
    )
    assert go_on() == go_on(data="./photos") == 4
    shutil.copytree(here / "photos", here / "moved")
    with pytest.raises(hpm.UserError, match="there data is photos, here moved"):
        go_on(data="moved")
    run = hpm.pretrain(data="photos", out="run", init_partial=True, **OPTIONS)
    assert "fingerprint" in read_tensors(run.latest_checkpoint())[1]

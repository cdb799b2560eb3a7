"""A run goes on with what it began with, however that is written; with nothing else."""

import shutil

import pytest
import torch
import yaml
from helpers import TINY, stop_after, write_images

import hpm
from hpm.core.config import PretrainConfig, secondary_mask_ratio
from hpm.core.files import read_tensors, write_tensors
from hpm.core.options import lay_over, make_config, read_preset
from hpm.models.architecture import resolve_model
from hpm.show.run import Run
from hpm.training.build import build_run
from hpm.training.resume import config_text
from hpm.training.schedule import resolve
from hpm.weights.run_folder import following_options

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


def test_a_default_that_has_changed_is_noticed(here):
    """Of options that config.yaml shows in comments: the checkpoint has them."""
    assert "decoder_heads" not in yaml.safe_load((here / "run" / "config.yaml").read_text())
    with pytest.raises(hpm.UserError, match="holds another run: there decoder_heads is 2, here 4"):
        go_on(decoder_heads=4)


def test_a_run_whose_config_has_all_defaults_goes_on(here):
    """Older versions wrote them."""
    path = Run(here / "run").latest_checkpoint()
    (here / "run" / "config.yaml").write_text(yaml.safe_dump(read_tensors(path)[1]["config"]))
    assert go_on() == 4
    with pytest.raises(hpm.UserError, match="there decoder_heads is 2, here 4"):
        go_on(decoder_heads=4)


def test_the_config_of_a_run_as_that_of_another(finished_run, here):
    """Defaults that follow from mask, model and first weights follow what is changed."""
    file = finished_run.config_file
    assert "\n# hard_share_end: 0.5\n" in file.read_text()
    assert yaml.safe_load(file.read_text())["hard_share_start"] == TINY["hard_share_start"]

    def other(**options):
        return make_config(PretrainConfig, lay_over(read_preset(file), options))

    assert other(mask="hardest").hard_shares[1] == 1
    assert secondary_mask_ratio(other(mask="uniform")) == 0.25
    heads = resolve_model(PretrainConfig("x", "y", model="vit_base")).decoders.decoder_heads
    assert resolve_model(other(model="vit_base", decoder_dim=512)).decoders.decoder_heads == heads
    backbone = str(here / "first" / "backbone.safetensors")
    config = other(init=backbone, init_partial=True, out=str(here / "other"))
    config = build_run(config, torch.device("cpu")).config
    assert (config.freeze_encoder, config.layer_decay) == ("10%", 0.75)
    again = build_run(other(data="photos", out=str(here / "same")), torch.device("cpu")).config
    assert again.hard_shares == (0.25, 0.5) and again.decoder_heads == 2


def test_what_follows_is_not_carried_over(tmp_path):
    """Patches follow the model, normalisation the first weights, the rate the length."""
    given = PretrainConfig("photos", "run", steps=100)
    text = config_text(given, resolve(given, 1000, torch.device("cpu"), 1))
    names = {"patch_size", "base_lr", "precision", "normalize"}
    assert names <= following_options(text).keys() and not names & yaml.safe_load(text).keys()
    (tmp_path / "config.yaml").write_text(text)
    options = lay_over(read_preset(tmp_path / "config.yaml"), {"steps": 50_000})
    other = make_config(PretrainConfig, options | {"model": "vit_huge"})
    for name in names:
        assert getattr(other, name) == getattr(given, name), name


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

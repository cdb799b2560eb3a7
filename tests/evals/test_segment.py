"""Segmentation: both heads, what they leave behind, and what is refused."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from jobs import torchrun
from PIL import Image
from safetensors.torch import load_file
from segmentation import LINEAR, UPERNET, arguments, assert_equal_weights, losses, model_in
from torch.nn import functional as F

import hpm
from hpm.core.options import make_config, read_preset
from hpm.data.demo import CLASSES
from hpm.data.segmentation import open_segmentation
from hpm.evals.segment import Options
from hpm.evals.segment.figure import _picture
from hpm.evals.segment.linear import pixel_features
from hpm.training.optim import polynomial_rate

# Numbers


def test_the_linear_head_beats_one_class_everywhere(linear_segmenter, scenes):
    _, result = linear_segmenter
    assert list(result.values) == ["trained", "random weights"]
    numbers = result.values["trained"]["segment"]
    assert set(numbers) == {
        f"{name}{end}"
        for name in ("mean_iou", "mean_accuracy", "pixel_accuracy")
        for end in ("", "_low", "_high")
    }
    test = open_segmentation(str(scenes)).test
    labels = np.concatenate([test.label_map(i).ravel() for i in range(len(test))])
    background = 100 * (labels[labels != 255] == 0).mean()
    assert numbers["mean_iou_low"] <= numbers["mean_iou"] <= numbers["mean_iou_high"]
    assert numbers["mean_iou"] > background / 2 + 3  # as if all were background
    iou = result.per_class["trained"]["segment"]
    assert set(iou) == {"background", "object"}
    assert np.mean([each["iou"] for each in iou.values()]) == pytest.approx(numbers["mean_iou"])


def test_the_learning_rate_is_one_of_the_grid(linear_segmenter):
    chosen = linear_segmenter[1].chosen["trained"]
    assert chosen["lr"] in Options("r", "d").lr and 0 < chosen["held_out_mean_iou"] < 100


def test_a_head_that_diverges_is_not_chosen(finished_run, scenes, tmp_path):
    options = LINEAR | {"steps": 3, "baselines": False, "figure_images": 0, "out": str(tmp_path)}
    run, data = str(finished_run.folder), str(scenes)
    result = hpm.evaluate("segment", run, data, lr=(1e38, 1e-9), **options)
    assert result.chosen["trained"]["lr"] == 1e-9
    with pytest.raises(hpm.UserError, match="on trained diverges at every learning rate"):
        hpm.evaluate("segment", run, data, lr=(1e38,), **options)


def test_table_and_files(linear_segmenter):
    out, result = linear_segmenter
    assert "mean IoU" in str(result) and "pixel accuracy" in str(result)
    content = json.loads(result.file.read_text())
    assert content["values"] == result.values and content["about"]["image_size"] == 32
    (figure,) = out.glob("*_images.png")
    assert content["figures"] == [figure.name]
    with Image.open(figure) as image:
        assert min(image.size) > 300
    assert {file.parent.name for file in out.rglob("segmenter.safetensors")} == {
        "trained",
        "random_weights",
    }


def test_pictures_of_other_images_than_rgb():
    """Of more than 8 bits or in units of their own, as in detection; with further channels."""
    hounsfield = torch.linspace(-250_000, 750_000, 100).view(1, 10, 10)
    picture = _picture(hounsfield, (20, 20))
    assert picture.min() == 0 and picture.max() == 255
    assert ((picture > 10) & (picture < 245)).mean() > 0.8
    four = torch.arange(4, dtype=torch.uint8)[:, None, None].expand(4, 8, 8) * 50
    assert _picture(four, (8, 8))[0, 0].tolist() == [0, 50, 100]


def test_the_same_evaluation_again_has_the_same_file(finished_run, scenes, tmp_path):
    """Also where options that are not given, such as the stride, follow from others."""
    options = LINEAR | {"steps": 2, "baselines": False, "figure_images": 0, "out": str(tmp_path)}
    first, again = (
        hpm.evaluate("segment", str(finished_run.folder), str(scenes), **options) for _ in range(2)
    )
    assert first.file == again.file and first.about["stride"] == 21
    assert first.about["resolved"] == ["stride"]


def test_compared_with_another(finished_run, scenes, tmp_path):
    run = str(finished_run.folder)
    options = LINEAR | {"steps": 5, "baselines": False, "figure_images": 0}
    result = hpm.evaluate("segment", run, str(scenes), compare=run, out=str(tmp_path), **options)
    assert list(result.values) == ["trained", "compared"]
    assert result.differences["trained"]["segment"]["mean_iou"] == 0
    assert not list(tmp_path.glob("*.png"))


def test_other_test_images_are_those_of_their_test_split(finished_run, scenes, tmp_path):
    run, data = str(finished_run.folder), str(scenes)
    options = LINEAR | {"steps": 1, "baselines": False, "figure_images": 0}
    result = hpm.evaluate("segment", run, data, test=data, out=str(tmp_path), **options)
    assert (result.about["train_images"], result.about["test_images"]) == (24, 6)


def test_pixel_features_are_those_of_enlarged_maps():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 3, 4, generator=generator)
    places = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"), -1)
    found = pixel_features(maps, places.view(1, -1, 2).expand(2, -1, -1), 12)
    naive = F.interpolate(maps, (12, 12), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, naive)


@pytest.mark.slow
def test_the_demo_needs_no_folder(finished_run, tmp_path):
    options = LINEAR | {"steps": 10, "baselines": False, "train_share": 0.01, "figure_images": 1}
    result = hpm.evaluate("segment", str(finished_run.folder), "demo", out=str(tmp_path), **options)
    assert result.about["train_images"] == 41 and result.about["test_images"] == 1024
    assert set(result.per_class["trained"]["segment"]) == {"background", *CLASSES}


# UPerNet


def test_upernet_is_trained_and_only_tested_again(finished_run, scenes, upernet_segmenter):
    out, result = upernet_segmenter
    assert list(result.values) == ["trained"]
    assert len(losses(model_in(out))) == 3 and all(0 < loss < 3 for loss in losses(model_in(out)))
    before = load_file(model_in(out))
    again = hpm.evaluate("segment", str(finished_run.folder), str(scenes), out=str(out), **UPERNET)
    assert again.values == result.values and len(losses(model_in(out))) == 3
    assert_equal_weights(load_file(model_in(out)), before)
    with pytest.raises(hpm.UserError, match="is of a fine-tuning: name the run"):
        hpm.evaluate("knn", str(model_in(out).parent), str(scenes))


def test_stopped_in_the_middle_equals_straight_through(
    finished_run, scenes, upernet_segmenter, tmp_path
):
    from hpm.core.signals import Interrupted
    from hpm.evals.segment.upernet import UPerNetTraining

    save = UPerNetTraining.save

    def save_and_stop(training):
        save(training)
        if training.step == 2:
            signal.raise_signal(signal.SIGTERM)

    command = ("segment", str(finished_run.folder), str(scenes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UPerNetTraining, "save", save_and_stop)
        with pytest.raises(Interrupted):
            hpm.evaluate(*command, out=str(tmp_path), **UPERNET)
    assert not list(tmp_path.rglob("segmenter.safetensors"))
    hpm.evaluate(*command, out=str(tmp_path), **UPERNET)
    assert_equal_weights(load_file(model_in(tmp_path)), load_file(model_in(upernet_segmenter[0])))


@pytest.mark.slow
def test_upernet_learns(finished_run, scenes, tmp_path):
    options = UPERNET | {
        "steps": 150,
        "batch_size": 8,
        "peak_lr": 2e-3,
        "dropout": 0,
        "checkpoint_every": "100%",
        "distort": False,
    }
    result = hpm.evaluate(
        "segment", str(finished_run.folder), str(scenes), out=str(tmp_path), **options
    )
    found = losses(model_in(tmp_path))
    assert found[-1] < 0.7 * found[0]
    assert result.values["trained"]["segment"]["mean_iou"] > 55


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"precision": "bfloat16"}])
def test_upernet_with(changes, finished_run, scenes, tmp_path):
    options = UPERNET | {"steps": 2} | changes
    result = hpm.evaluate(
        "segment", str(finished_run.folder), str(scenes), out=str(tmp_path), **options
    )
    assert 0 < result.values["trained"]["segment"]["mean_iou"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("options", [LINEAR | {"steps": 10}, UPERNET], ids=["linear", "upernet"])
def test_two_processes_equal_one(options, finished_run, scenes, tmp_path):
    """Batch norms and the mean of the loss are over the pixels of both."""
    off = {"dropout": 0, "drop_path": 0, "baselines": "false", "figure_images": 0}
    command = ["eval", "segment", finished_run.folder, scenes, *arguments(options | off)]
    one = run_here(*command, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = torchrun("-m", "hpm", *command, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    files = [model_in(tmp_path / name) for name in ("one", "two")]
    if options["head"] == "upernet":
        # Adam magnifies rounding where gradients are 0, as of a bias before a batch norm.
        assert losses(files[1]) == pytest.approx(losses(files[0]), rel=1e-3)
        files = [load_file(file) for file in files]
        norm = "head.fuse.1.running_var"
        torch.testing.assert_close(files[1][norm], files[0][norm], rtol=2e-2, atol=1e-4)
        return
    first, second = map(load_file, files)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_schedule():
    rates = [polynomial_rate(step, 10, 4, 1.0, 1.0, 0.2, 0.1) for step in (0, 2, 4, 7, 10)]
    assert rates == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1])
    assert polynomial_rate(5, 10, 0, 1.0, power=2) == pytest.approx(0.25)


def test_presets_have_the_published_settings():
    base, large = (
        make_config(Options, {"run": "r", "data": "d"} | read_preset(f"segment_vit_{size}_ade20k"))
        for size in ("base", "large")
    )
    for each in (base, large):
        assert (each.head, each.image_size, each.stride, each.scale) == (
            "upernet",
            512,
            341,
            (0.5, 2.0),
        )
        assert each.flip and each.distort and (each.steps, each.batch_size) == (160_000, 16)
        assert (each.peak_lr, each.betas, each.weight_decay) == (1e-4, (0.9, 0.999), 0.05)
        assert (each.warmup, each.warmup_lr, each.power, each.min_lr) == ("1500 steps", 1e-6, 1, 0)
        assert not each.with_random_weights
    assert (base.layer_decay, base.drop_path, base.channels) == (0.65, 0.1, 768)
    assert (large.layer_decay, large.drop_path) == (0.75, 0.2)


# Bad input


def broken(scenes, tmp_path, change):
    """A copy of the scenes with something wrong in it."""
    root = tmp_path / "broken"
    shutil.copytree(scenes, root)
    change(root)
    return root


def resize_mask(root):
    Image.new("L", (12, 12)).save(root / "train" / "masks" / "03.png")


def strange_label(root):
    Image.new("L", (40, 40), 77).save(root / "train" / "masks" / "03.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (resize_mask, ["03.png", "its mask is 12x12 pixels, the image 40x40"]),
        (strange_label, ["03.png", "label 77 is none of the 2 classes'"]),
        (lambda root: (root / "train/masks/03.png").unlink(), ["has no mask for", "03.png"]),
        (lambda root: (root / "train/images/03.png").unlink(), ["has no image for", "03.png"]),
        (lambda root: shutil.rmtree(root / "val/masks"), ["the split val has images but no masks"]),
        (lambda root: shutil.rmtree(root / "train/masks"), ["the split train has images but no"]),
    ],
)
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_wrong_data(head, change, words, finished_run, scenes, tmp_path):
    root = broken(scenes, tmp_path, change)
    options = {"linear": LINEAR, "upernet": UPERNET}[head]
    result = run_here(
        "eval", "segment", finished_run.folder, root, "--out", tmp_path / "out", *arguments(options)
    )
    assert_refused(result, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 18}, "image_size 18 is not a multiple of this backbone's patch_size 4"),
        ({"stride": 33}, "leaves gaps between windows"),
        ({"crop_share": 0.5}, "segmentation reads whole images: leave --crop-share out"),
        ({"frames": 4}, "segmentation is for images: leave --frames out"),
        ({"head": "upernet", "accumulate": 30}, "60 or more can"),
        ({"head": "upernet", "layer_decay": 2}, "--layer-decay is 2"),
        ({"scale": "2,1"}, "the second must not be below the first"),
        ({"lr": 0}, "lr"),
        ({"head": "upernet", "lr": 0.001}, "lr is an option of --head linear, and head is upernet"),
        ({"drop_path": 0.2}, "drop_path is an option of --head upernet, and head is linear"),
    ],
)
def test_wrong_options(options, words, finished_run, scenes, tmp_path):
    result = run_here(
        "eval",
        "segment",
        finished_run.folder,
        scenes,
        "--out",
        tmp_path,
        *arguments(LINEAR | options),
    )
    assert_refused(result, words)


@pytest.mark.slow
def test_a_grid_that_cannot_be_read_by_upernet(scenes, tmp_path):
    """Hiera's blocks are of several grids: UPerNet reads a plain ViT."""
    pytest.importorskip("timm")
    from helpers import TINY

    options = TINY | {"model": "timm/hiera_tiny_224", "image_size": 64, "steps": 1, "holdout": 0}
    del options["patch_size"]
    run = hpm.pretrain(data=str(scenes / "train" / "images"), out=str(tmp_path / "run"), **options)
    result = run_here(
        "eval", "segment", run.folder, scenes, *arguments(UPERNET | {"image_size": 64})
    )
    assert_refused(result, "take a plain ViT")

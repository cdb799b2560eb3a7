import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import run_hpm, write_images
from PIL import Image
from safetensors.torch import load_file

import hpm
from hpm.core.files import read_tensors, write_tensors
from hpm.data.loader import TrainingViews
from hpm.evals import finetune
from hpm.evals.finetune.augmentation import Augmentation, seed_everything
from hpm.models.architecture import Architecture
from hpm.models.build import build_classifier, build_encoder
from hpm.models.patches import interpolate_positions

ARCHITECTURE = Architecture(
    image_size=(16, 16), patch_size=(4, 4), channels=3, embed_dim=32, depth=2, num_heads=2
)
OPTIONS = {"epochs": 6, "batch_size": 12, "workers": 0}
PLAIN = {"mixup": 0, "cutmix": 0, "rand_augment": "none", "random_erase": 0, "base_lr": 4e-2}


@pytest.fixture(scope="module")
def finetuned(finished_run, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune")
    return out, hpm.evaluate(
        "finetune",
        str(finished_run.folder),
        str(image_folder),
        out=str(out),
        baselines=True,
        **OPTIONS,
    )


def test_table_and_files(finetuned):
    out, result = finetuned
    assert list(result.values) == ["trained", "random weights", "raw pixels (linear)"]
    for values in result.values.values():
        assert set(values["finetune"]) == {
            "top1",
            "top1_low",
            "top1_high",
            "top5",
            "mean_per_class",
        }
    assert result.file and json.loads(result.file.read_text())["values"] == result.values
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    losses = [
        json.loads(line)["loss"]
        for line in (folder / "trained" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 < loss < 2 for loss in losses) and len(losses) > 1
    assert "head.weight" in load_file(folder / "trained" / "classifier.safetensors")


def test_it_learns(finished_run, image_folder, tmp_path):
    """Colours tell the classes: without strong augmentation that is quick to learn."""
    result = hpm.evaluate(
        "finetune",
        str(finished_run.folder),
        str(image_folder),
        out=str(tmp_path),
        baselines=False,
        **(OPTIONS | PLAIN | {"epochs": 15}),
    )
    assert result.values["trained"]["finetune"]["top1"] > 80


def test_its_checkpoint_is_no_run(finetuned, image_folder):
    (folder,) = finetuned[0].glob("*/trained")
    with pytest.raises(hpm.UserError, match="is of a fine-tuning: name the run"):
        hpm.evaluate("knn", str(folder), str(image_folder))


def test_a_finished_one_is_only_tested_again(finished_run, image_folder, finetuned):
    out, result = finetuned
    again = hpm.evaluate(
        "finetune",
        str(finished_run.folder),
        str(image_folder),
        out=str(out),
        baselines=True,
        **OPTIONS,
    )
    assert again.values == result.values


def test_other_weights_in_the_same_folder_are_refused(
    finished_run, image_folder, finetuned, tmp_path
):
    out, _ = finetuned
    tensors, meta = read_tensors(finished_run.backbone)
    tensors["patch_embed.proj.weight"] *= 2
    write_tensors(tmp_path / "other.safetensors", tensors, meta)
    with pytest.raises(hpm.UserError, match="there weights is .*; choose another --out"):
        hpm.evaluate(
            "finetune",
            str(tmp_path / "other.safetensors"),
            str(image_folder),
            out=str(out),
            baselines=True,
            **OPTIONS,
        )


def test_corrected_labels_are_not_tested_with_the_model_of_the_old_ones(
    finished_run, image_folder, tmp_path
):
    data = shutil.copytree(image_folder, tmp_path / "data")
    options = OPTIONS | {"epochs": 1, "out": str(tmp_path / "out")}
    hpm.evaluate("finetune", str(finished_run.folder), str(data), **options)
    for before, after in (("class_0", "x"), ("class_1", "class_0"), ("x", "class_1")):
        (data / before).rename(data / after)
    with pytest.raises(hpm.UserError, match=r"on other data \(.*\): choose another --out"):
        hpm.evaluate("finetune", str(finished_run.folder), str(data), **options)


def test_random_weights_are_not_trained_unless_asked_for(finished_run, image_folder, tmp_path):
    """Each setting has a folder of its own; how it is tested has no part in that."""
    options = OPTIONS | {"epochs": 1, "out": str(tmp_path)}
    run, data = str(finished_run.folder), str(image_folder)
    one = hpm.evaluate("finetune", run, data, **options)
    assert list(one.values) == ["trained"]
    (trained,) = tmp_path.rglob("classifier.safetensors")
    assert trained.parent.name == "trained"
    two = hpm.evaluate("finetune", run, data, crop_share=0.5, **options)
    assert two.file != one.file and list(tmp_path.rglob("classifier.safetensors")) == [trained]
    both = hpm.evaluate("finetune", run, data, baselines=True, **options)
    assert "random weights" in both.values and both.values["trained"] == one.values["trained"]
    names = {file.parent.name for file in tmp_path.rglob("classifier.safetensors")}
    assert names == {"trained", "random_weights"}
    hpm.evaluate("finetune", run, data, mixup=0.1, **options)
    assert len(list(tmp_path.rglob("classifier.safetensors"))) == 3
    assert len(list(tmp_path.glob("*.json"))) == 4


@pytest.mark.slow
def test_stopped_and_gone_on_equals_straight_through(finished_run, image_folder, tmp_path):
    """SIGTERM in the middle; the same command then ends at the same weights."""
    options = {"epochs": 30, "batch_size": 12, "workers": 0, "baselines": "false"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = ["eval", "finetune", finished_run.folder, image_folder, *arguments]
    # In a process of its own, like the other one: here, shape checks draw random numbers.
    straight = run_hpm(*command, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "hpm", *map(str, command), "--out", str(tmp_path / "stopped")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    checkpoints = tmp_path / "stopped"
    deadline = time.monotonic() + 60
    while not list(checkpoints.rglob("step_*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "run the same command again to resume" in errors
    resumed = run_hpm(*command, "--out", tmp_path / "stopped")
    assert resumed.returncode == 0, resumed.stderr
    (one,) = (tmp_path / "straight").rglob("classifier.safetensors")
    (two,) = (tmp_path / "stopped").rglob("classifier.safetensors")
    one, two = load_file(one), load_file(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_new_head_predicts_nothing_yet(pool):
    weights = build_encoder(ARCHITECTURE, seed=1).state_dict()
    classifier = build_classifier(ARCHITECTURE, weights, 5, pool)
    assert classifier(torch.randn(2, 3, 16, 16)).abs().max() < 1e-3
    assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.3)
    assert classifier.encoder.pos_embed.requires_grad
    names = dict(classifier.encoder.named_parameters())
    torch.testing.assert_close(
        names["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"]
    )


def test_another_image_size_keeps_the_weights():
    weights = build_encoder(ARCHITECTURE, seed=1).state_dict()
    classifier = build_classifier(ARCHITECTURE, weights, 5, image_size=(24, 16))
    assert classifier(torch.randn(2, 3, 24, 16)).shape == (2, 5)
    assert classifier.encoder.pos_embed.shape == (1, 1 + 6 * 4, 32)


def test_interpolated_positions():
    """The same grid is left as it is; a linear ramp stays one; the class token is not touched."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(6.0), indexing="ij")
    ramp = torch.cat([torch.full((1, 1, 2), 9.0), torch.stack([y, x], -1).view(1, 72, 2)], 1)
    assert torch.equal(interpolate_positions(ramp, (12, 6), (12, 6)), ramp)
    larger = interpolate_positions(ramp, (12, 6), (24, 12))
    assert torch.equal(larger[:, :1], ramp[:, :1])
    rows = larger[0, 1:, 0].view(24, 12)
    steps = (rows[2:] - rows[:-2])[5:-5]  # two new rows are one old one
    torch.testing.assert_close(steps, torch.ones_like(steps), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.diff(dim=1), torch.zeros(24, 11), atol=1e-5, rtol=0)


def test_drop_path_is_for_training_alone():
    torch.manual_seed(0)
    encoder = build_encoder(ARCHITECTURE, seed=1, drop_path=0.9)
    images = torch.randn(4, 3, 16, 16)
    plain = build_encoder(ARCHITECTURE, seed=1)
    torch.testing.assert_close(encoder.eval()(images), plain(images))
    assert not torch.allclose(encoder.train()(images), plain(images))


def test_bad_finetuning(finished_run, image_folder, tmp_path):
    run, data = str(finished_run.folder), str(image_folder)

    def refused(words, **options):
        with pytest.raises(hpm.UserError, match=words):
            hpm.evaluate("finetune", run, data, out=str(tmp_path), **options)

    refused("image_size 18 is not a multiple of this backbone's patch_size 4", image_size=18)
    refused("rand_augment is 'rand-x9', which timm cannot read", rand_augment="rand-x9")
    refused("layer_decay is 1.5", layer_decay=1.5)
    refused("drop_path is 1;", drop_path=1.0)
    refused("epochs is 0", epochs=0)
    refused("'5 weeks' is not a duration", warmup="5 weeks")
    refused("train_share is 0", train_share=0.0)
    refused("39 images cannot be a batch of 1 process, accumulate 30: 60 or more", accumulate=30)
    with pytest.raises(hpm.UserError, match="pass --out FOLDER"):
        hpm.evaluate("finetune", str(finished_run.backbone), data)


def test_grey_images(tmp_path):
    """timm's augmentation knows RGB; one channel goes there and back."""
    from helpers import TINY

    images = write_images(tmp_path / "images", classes=2, per_class=10)
    run = hpm.pretrain(
        data=str(images), out=str(tmp_path / "run"), **(TINY | {"channels": 1, "steps": 2})
    )
    result = hpm.evaluate(
        "finetune",
        str(run.folder),
        str(images),
        epochs=2,
        batch_size=8,
        workers=0,
        baselines=False,
        image_size=24,
    )
    assert 0 <= result.values["trained"]["finetune"]["top1"] <= 100


def test_presets_have_the_papers_settings():
    from hpm.core.options import make_config, read_preset
    from hpm.evals.finetune import Options

    base, large = (
        make_config(Options, {"run": "r", "data": "d"} | read_preset(f"finetune_vit_{size}"))
        for size in ("base", "large")
    )
    assert (base.epochs, base.base_lr, base.layer_decay, base.drop_path) == (100, 5e-4, 0.8, 0.1)
    assert (large.epochs, large.batch_size) == (50, 1024)
    assert base.crop_share == large.crop_share == 0.875 and not base.baselines


def test_every_strength_of_rand_augment_can_be_drawn():
    """At the highest strength timm asks for posterize with no bit, which Pillow refuses."""
    options = finetune.Options("run", "data", rand_augment="rand-m10-inc1")
    plain = TrainingViews((16, 16), 3, 0, (0.08, 1.0), True, 1)
    augmentation = Augmentation(options, torch.full((3,), 0.5), plain, 2)
    image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    for seed in range(60):  # each draws 2 of 15 operations
        seed_everything(seed)
        augmentation.views.transform(image)

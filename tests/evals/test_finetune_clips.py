"""Fine-tuning on clips."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, run_here
from PIL import Image
from safetensors.torch import load_file

import hpm
from hpm.core.files import read_tensors
from hpm.core.options import make_config, read_preset
from hpm.data.loader import training_views
from hpm.data.sources import open_source
from hpm.data.video.sampling import ClipSampling
from hpm.evals.finetune import Options
from hpm.evals.finetune.augmentation import Augmentation, FinetuneClipViews, seed_everything
from hpm.training.supervised import SupervisedTraining

CLIPS = TINY | {"frames": 4, "frame_stride": 2, "patch_size": (2, 8, 8), "steps": 2}
FEW = {"epochs": 3, "batch_size": 8, "workers": 0}
PLAIN = {"mixup": 0, "cutmix": 0, "rand_augment": "none", "random_erase": 0, "flip": "none"}


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """Two classes of 12 videos each, as folders of 8 frames of 16 x 16, which become brighter or
    darker: equal as sets of frames."""
    folder, rng = tmp_path_factory.mktemp("growing"), np.random.default_rng(0)
    for number in range(24):
        video = folder / ("brighter", "darker")[number % 2] / f"{number:02d}"
        video.mkdir(parents=True)
        background = rng.integers(0, 40, (16, 16, 3))
        for time in range(8):
            level = 25 * (time if number % 2 == 0 else 7 - time)
            frame = (background + level).astype(np.uint8)
            Image.fromarray(frame).save(video / f"{time:03d}.png")
    return folder


@pytest.fixture(scope="module")
def clip_run(growing, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "clips"
    return hpm.pretrain(data=str(growing), out=str(out), **CLIPS)


@pytest.mark.slow
def test_the_whole_recipe(clip_run, growing, tmp_path):
    """From the command line: all augmentations, two views of each clip, tested on 2 x 3 views."""
    options = ["--epochs=3", "--batch-size=8", "--workers=0", "--repeat-augment=2"]
    options += ["--segments=2", "--crops=3", "--baselines=true"]
    result = run_here("eval", "finetune", clip_run.folder, growing, *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "random weights" in result.stdout and "raw pixels (linear)" in result.stdout
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert "2 segment" not in folder.name
    losses = [
        json.loads(line)["loss"]
        for line in (folder / "trained" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 < loss < 2 for loss in losses)
    assert "Learning rate" in (folder / "report.html").read_text()
    about = read_tensors(folder / "trained" / "classifier.safetensors")[1]
    assert about["architecture"]["image_size"] == [4, 16, 16] and about["frame_stride"] == 2
    # Other views to test on: the trained weights are used again.
    run, data = str(clip_run.folder), str(growing)
    again = hpm.evaluate("finetune", run, data, out=str(tmp_path), repeat_augment=2, **FEW)
    assert again.about["training"] == folder.name and again.about["test_images"] == 4


@pytest.mark.slow
def test_it_learns_what_no_frame_tells(clip_run, growing, tmp_path):
    run, data = str(clip_run.folder), str(growing)
    options = FEW | PLAIN | {"epochs": 12, "base_lr": 4e-2, "crop_scale": (0.8, 1.0)}
    result = hpm.evaluate("finetune", run, data, out=str(tmp_path), **options)
    assert result.values["trained"]["finetune"]["top1"] == 100
    still = hpm.evaluate("finetune", run, data, out=str(tmp_path), frame_stride=0, **options)
    assert still.values["trained"]["finetune"]["top1"] < 100


def test_resuming(clip_run, growing, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch, it ends at the same weights, bitwise."""
    run, data = str(clip_run.folder), str(growing)
    options = FEW | {"repeat_augment": 2, "checkpoint_every": "1 steps", "crops": 2}
    whole = hpm.evaluate("finetune", run, data, out=str(tmp_path / "whole"), **options)
    save = SupervisedTraining.save

    def save_and_stop(training):
        save(training)
        if training.step == 3:  # an epoch has two steps
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SupervisedTraining, "save", save_and_stop)
        hpm.evaluate("finetune", run, data, out=str(tmp_path / "parts"), **options)
    parts = hpm.evaluate("finetune", run, data, out=str(tmp_path / "parts"), **options)
    assert parts.values == whole.values
    (one,) = (tmp_path / "whole").rglob("classifier.safetensors")
    (two,) = (tmp_path / "parts").rglob("classifier.safetensors")
    one, two = load_file(one), load_file(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_all_frames_are_augmented_alike(growing):
    """A clip of one frame repeated stays one, whatever is drawn; views of a clip differ."""
    options = Options("run", "data", rand_augment="rand-m9-n3-mstd0.5")
    source = open_source(str(growing), clips=True).train
    views = training_views(source, (16, 16), 3, 0, (0.08, 1.0), True, 1, ClipSampling(4, 0))
    augmentation = Augmentation(options, torch.full((3,), 0.5), views, 2)
    differ = []
    for index in range(12):
        view, _ = augmentation.views(source, (0, index, 0))
        other, _ = augmentation.views(source, (0, index, 1))
        assert view.shape == (3, 4, 16, 16)
        assert all(np.array_equal(view[:, 0], view[:, time]) for time in range(4))
        differ.append(not np.array_equal(view, other))
    assert sum(differ) >= 10


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_frames_of_any_depth_are_augmented(kind, tmp_path):
    """Their values keep their scale: half of white stays half of white."""
    half = {np.uint8: 128, np.uint16: 128 * 257, np.float32: 128 / 255}[kind]
    (tmp_path / "video").mkdir()
    for time in range(4):
        frame = Image.fromarray(np.full((16, 16), half, kind))
        frame.save(tmp_path / "video" / f"{time}.{'png' if kind == np.uint8 else 'tif'}")
    source = open_source(str(tmp_path), clips=True).train
    views = training_views(source, (8, 8), 1, 0, (0.5, 1.0), True, 1, ClipSampling(4, 1))
    view, _ = FinetuneClipViews(views, lambda image: image.resize((8, 8)))(source, (0, 0))
    assert view.shape == (1, 4, 8, 8) and (view == 128).all()


def test_erasing_and_mixing_keep_the_time(growing):
    """The box of a clip is the same in all of its frames, and no frame is mixed with another."""
    options = Options("run", "data", random_erase=0.999, mixup=0.0, cutmix=1.0, label_smoothing=0.0)
    source = open_source(str(growing), clips=True).train
    views = training_views(source, (32, 32), 3, 0, (0.08, 1.0), True, 1, ClipSampling(4, 1))
    augmentation = Augmentation(options, torch.full((3,), 0.5), views, 2)
    clips = torch.arange(2.0)[:, None, None, None, None].expand(2, 3, 4, 32, 32)
    clips = clips * 100 + torch.arange(4.0)[:, None, None] + torch.zeros(1, 3, 1, 32, 32)
    seen = []

    class Model(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(2, 2)

    model = Model()
    seed_everything(0)
    augmentation.erase = None
    augmentation.loss(model, clips.clone(), torch.tensor([0, 1]), torch.no_grad)
    (mixed,) = seen
    assert mixed.shape == clips.shape
    assert torch.equal(mixed % 100, clips % 100) and not torch.equal(mixed, clips)
    from_other = (mixed != clips)[:, 0]
    assert torch.equal(from_other, from_other[:, :1].expand_as(from_other))
    erasing = Augmentation(options, torch.full((3,), 0.5), views, 2)
    erasing.mix = None
    erasing.loss(model, clips.clone(), torch.tensor([0, 1]), torch.no_grad)
    erased = (seen[1] != clips)[:, 0]
    assert erased.any() and torch.equal(erased, erased[:, :1].expand_as(erased))


def test_presets_of_the_videomae_recipe():
    presets = (read_preset(f"finetune_video_vit_base_{name}") for name in ("k400", "ssv2"))
    k400, ssv2 = (make_config(Options, {"run": "r", "data": "d"} | each) for each in presets)
    assert (k400.epochs, k400.base_lr, k400.segments, k400.crops) == (100, 1e-3, 5, 3)
    assert (ssv2.epochs, ssv2.base_lr, ssv2.segments, ssv2.crops) == (50, 5e-4, 2, 3)
    assert (k400.flip, ssv2.flip) == (True, "none")
    for each in (k400, ssv2):
        assert (each.layer_decay, each.repeat_augment, each.mixup, each.cutmix) == (0.75, 2, 0.8, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image-size=20"], "image_size 20 is not a multiple"),
        (["--repeat-augment=0"], "--repeat-augment is 0"),
        (["--batch-size=4", "--repeat-augment=5"], "cannot be a batch"),
    ],
)
def test_bad_finetuning_on_clips(options, words, clip_run, growing, tmp_path):
    command = ["eval", "finetune", clip_run.folder, growing, "--out", tmp_path, *options]
    assert_refused(run_here(*command), words)

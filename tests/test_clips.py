"""Pre-training on clips, from folders of numbered frames to the backbone."""

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments
from jobs import torchrun
from PIL import Image

import hpm
from hpm.commands.ablate import ablate
from hpm.commands.options import AblateConfig
from hpm.core.files import read_tensors
from hpm.core.options import make_config
from hpm.weights.resolve import load

CLIPS = TINY | {
    "frames": 4,
    "frame_stride": 2,
    "patch_size": (2, 8, 8),
    "mask_ratio": 0.5,
    "holdout": 2,
    "log_every": 1,
    "batch_size": 4,
}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """24 videos of ten frames: a bright square that moves over noise."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for number in range(24):
        video = folder / f"video_{number:02d}"
        video.mkdir()
        background = rng.integers(0, 90, (20, 20, 3))
        for time in range(10):
            frame = background.copy()
            frame[number % 12 : number % 12 + 6, time : time + 6] = 220
            Image.fromarray(frame.astype(np.uint8)).save(video / f"{time:03d}.png")
    return folder


@pytest.fixture(scope="module")
def clip_run(clip_folder, tmp_path_factory):
    """A finished run that mines tubes, and decodes half of what is hidden."""
    out = tmp_path_factory.mktemp("runs") / "clips"
    options = CLIPS | {"mine_tubes": "max", "decoder_keep": 0.5}
    return hpm.pretrain(data=str(clip_folder), out=str(out), **options)


def test_the_run_of_clips(clip_run):
    metrics = clip_run.metrics()
    assert metrics[-1]["held_out/ranking_accuracy"] >= 0
    assert [path.name for path in clip_run.figures.iterdir()] == ["step_00000008.png"]
    assert "held-out clip" in (clip_run.folder / "report.html").read_text()
    encoder = hpm.load_encoder(clip_run.folder)
    clips = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    pooled, patches = encoder(clips)
    assert pooled.shape == (2, 96) and patches.shape == (2, 8, 96)
    from_file = hpm.load_encoder(clip_run.backbone)
    assert torch.equal(from_file(clips)[0], pooled)
    larger = hpm.load_encoder(clip_run.folder, image_size=32)
    assert larger(clips.repeat_interleave(2, 3).repeat_interleave(2, 4))[1].shape == (2, 32, 96)
    with pytest.raises(hpm.UserError, match=r"takes \[B 3 4 16 16\]"):
        encoder(clips[:, :, 0])
    with pytest.raises(hpm.UserError, match="2 frames, but this encoder takes 4"):
        encoder(clips[:, :, ::2])


def test_features_of_clips(clip_run, clip_folder, tmp_path):
    """A row for each video; the page shows the frame in the middle."""
    out = tmp_path / "f.npy"
    found = hpm.embed(clip_run.folder, clip_folder, out, str, workers=0, device="cpu")
    assert len(found) == 24 and found.about["clip"] == [4, 2]
    video = clip_folder / "video_03"
    similar = run_here("similar", out, video, "--count=2", "--device=cpu")
    assert similar.returncode == 0, similar.stderr
    assert len(similar.stdout.splitlines()) == 2 and str(video) not in similar.stdout
    page = tmp_path / "page.html"
    assert run_here("show", out, "--out", page).returncode == 0
    assert f'title="{video}"' in page.read_text()


def final(run):
    return read_tensors(run.latest_checkpoint())[0]


@pytest.mark.parametrize(
    "options",
    [
        {"mine_tubes": "mean", "decoder_keep": 0.5, "mine_by": "memory", "repeat_augment": 2},
        pytest.param(
            {"positions": "sincos_1d", "class_token": False, "mine_every": 2, "target": "hog"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["memory", "mine_every"],
)
def test_resuming_from_the_middle_of_an_epoch(options, clip_folder, tmp_path, monkeypatch):
    options = CLIPS | options | {"data": str(clip_folder), "checkpoint_every": "3 steps"}
    whole = hpm.pretrain(out=str(tmp_path / "whole"), **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # an epoch has 5 steps
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(out=str(tmp_path / "parts"), **options)
    parts = hpm.pretrain(out=str(tmp_path / "parts"), **options)
    first, second = final(whole), final(parts)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert first["memory.found"].shape == (22, 2, 2, 2, 2)
    assert first["memory.found"].abs().sum() > 0


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(clip_folder, tmp_path):
    options = tiny_arguments(**CLIPS | {"patch_size": "2,8,8", "base_lr": 1e-3})
    options += ["--mine-tubes=mean", "--decoder-keep=0.5"]
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = ["pretrain", clip_folder, "--out", out, *options]
        result = torchrun("-m", "hpm", *command, processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (
        [m["reconstruction_loss"] for m in hpm.Run(tmp_path / n).metrics() if "grad_norm" in m]
        for n in "12"
    )
    assert len(one) == 8 and two == pytest.approx(one, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"mask": "tube"},
        {"mask": "multi_block", "target": "teacher"},
        {"mask": "block", "target": "pixels", "teacher_view": "masked"},
        {"mask": "moderate", "teacher_scale": 0.5, "mine_tubes": "mean"},
        {"mask": "hardest", "teacher_view": "masked", "mine_tubes": "max"},
        {"mask": "attention", "mine_by": "teacher"},
        {"mask": "blue_noise", "predictor_loss": "none", "secondary_mask_ratio": 0.5},
        {"mine_by": "progress", "mask_unit": 1, "accumulate": 2},
    ],
    ids=lambda options: options.get("mask", "progress"),
)
def test_every_way_to_mask_clips(options, clip_folder, tmp_path):
    options = CLIPS | {"steps": 3, "image_size": 32} | options
    run = hpm.pretrain(data=str(clip_folder), out=str(tmp_path / "run"), **options)
    losses = [m["reconstruction_loss"] for m in run.metrics() if "grad_norm" in m]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", ["image", "clip"])
def test_weights_of_images_and_of_other_clips(name, finished_run, clip_run, clip_folder, tmp_path):
    """All tensors match; only the projection and the positions are changed."""
    sizes = {"image": {"patch_size": (2, 4, 4)}, "clip": {"frames": 6, "frame_stride": 1}}[name]
    init = {"image": finished_run, "clip": clip_run}[name].folder
    options = CLIPS | sizes | {"steps": 1, "init": str(init), "base_lr": 0.0, "weight_decay": 0.0}
    run = hpm.pretrain(data=str(clip_folder), out=str(tmp_path / "run"), **options)
    log = (run.folder / "train.log").read_text()
    assert "init: 116 of 116 tensors" in log or "left over" not in log, log
    before, after = load(init).model.state_dict(), load(run.folder).model.state_dict()
    changed = {n for n in after if before[n].shape != after[n].shape}
    changed |= {n for n in after if n not in changed and not torch.equal(before[n], after[n])}
    wanted = {"encoder.pos_embed", "decoder_pos_embed"}
    if name == "image":
        heads = {
            f"{p}.head.{w}" for p in ("reconstructor", "predictor") for w in ("weight", "bias")
        }
        wanted |= heads | {"encoder.patch_embed.proj.weight"}
    assert changed == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frames=3"], ["2 frames", "clip of 3"]),
        (["--frames=4", "--patch-size=3,8,8"], ["3 frames", "clip of 4"]),
        (["--patch-size=2,8,8"], ["frames is 1"]),
        (["--mine-tubes=mean"], ["mine_tubes is mean", "frames is 1"]),
        (["--frames=4", "--mine-tubes=mean", "--mask=tube"], ["mask tube mines nothing"]),
        (["--frames=4", "--mask=uniform", "--patch-size=4"], ["--mask-ratio 0.875"]),
        (["--frames=4", "--model=timm/vit_tiny_patch16_224"], ["takes images"]),
        (
            ["--frames=4", "--target=frozen", "--target-model=timm/x"],
            ["target frozen takes images"],
        ),
        (
            ["--frames=4", "--teacher-scale=0.5", "--positions=sincos_1d"],
            ["positions is sincos_1d"],
        ),
        (["--mask=attention", "--class-token=false"], ["class token"]),
        (["--decoder-keep=0"], ["--decoder-keep is 0"]),
        (["--frames=4", "--probe=x"], ["probe", "clips"]),
    ],
)
def test_contradictions_are_refused(image_folder, tmp_path, options, words):
    result = run_here(
        "pretrain", image_folder, "--out", tmp_path / "r", *tiny_arguments(), *options
    )
    assert_refused(result, *words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("labelled", [False, True])
def test_ablations_of_folders_of_frames(labelled, clip_folder, tmp_path):
    """A video is a clip with its label, not a class of images, which its frames would be."""
    videos = tmp_path / "videos"
    for number, folder in enumerate(sorted(clip_folder.iterdir())[:12]):
        below = videos / f"class_{number % 2}" if labelled else videos
        below.mkdir(parents=True, exist_ok=True)
        (below / folder.name).symlink_to(folder)
    options = {"data": str(videos), "out": str(tmp_path / "a"), "vary": ("frames=4",)}
    config = make_config(AblateConfig, CLIPS | options | {"frames": 1, "seeds": 1, "steps": 2})
    (values,) = ablate(config).values.values()
    assert set(values[0]) >= ({"knn", "linear"} if labelled else {"rank", "patch_similarity"})

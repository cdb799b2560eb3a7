"""Evaluations of runs on clips, and of runs on images by the frames of clips."""

import pytest
import torch
from helpers import TINY, assert_refused, run_here

import hpm
from hpm.data.loader import evaluation_batches
from hpm.data.sources import open_source
from hpm.data.video.sampling import ClipSampling
from hpm.evals.features import EvaluatedBackbone, raw_patches, raw_pixels
from hpm.models.patches import patchify
from hpm.weights.resolve import load

CLIPS = TINY | {
    "frames": 4,
    "frame_stride": 2,
    "image_size": 16,
    "patch_size": (2, 8, 8),
    "mask_ratio": 0.5,
    "steps": 2,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "clips"
    return hpm.pretrain(data="demo-video", out=str(out), **CLIPS)


@pytest.mark.slow
def test_knn_of_clips(clip_run):
    options = ["--train-share=0.02", "--workers=0", "--k=[5]"]
    by_clips = run_here("eval", "knn", clip_run.folder, "demo-video", *options)
    assert by_clips.returncode == 0, by_clips.stderr
    assert "trained, patch mean" in by_clips.stdout and "raw pixels" in by_clips.stdout


@torch.no_grad()
def test_features_of_frames_are_averaged(finished_run):
    """An image run on clips: the mean of what it says of each frame."""
    trained = load(finished_run.folder)
    backbone = EvaluatedBackbone("trained", trained.backbone().eval(), trained.architecture)
    source = open_source("demo-video", clips=True).train
    batch = next(evaluation_batches(source, (16, 16), 3, 3, sampling=ClipSampling(4, 1)))
    assert batch.images.shape == (3, 3, 4, 16, 16)
    cls_token, patches = backbone.parts(batch.images)
    by_frame = [backbone.parts(batch.images[:, :, time]) for time in range(4)]
    torch.testing.assert_close(cls_token, torch.stack([cls for cls, _ in by_frame]).mean(0))
    torch.testing.assert_close(patches, torch.stack([each for _, each in by_frame]).mean(0))


def test_raw_pixels_of_clips():
    clips = torch.randint(0, 256, (2, 3, 4, 64, 48), dtype=torch.uint8)
    by_frame = [raw_pixels(clips[:, :, time]) for time in range(4)]
    found = raw_pixels(clips)
    assert found.shape == (2, 4 * by_frame[0].shape[1])
    assert found.mean(1).abs().max() < 1e-3
    frames = clips.float() / 255
    expected = torch.stack([patchify(frames[:, :, time], (8, 8)) for time in range(4)]).mean(0)
    torch.testing.assert_close(raw_patches(clips, (8, 8)), expected)
    torch.testing.assert_close(raw_patches(clips, (2, 8, 8)), patchify(frames, (2, 8, 8)))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["eval", "knn", "RUN", "demo-video", "--frames=8"], "is of clips of 4 frames"),
        (["eval", "knn", "RUN", "demo"], "images, not videos"),
        (["eval", "linear", "RUN", "demo-video", "--augment"], "--augment is for images"),
        (["eval", "finetune", "RUN", "demo-video"], "fine-tuning is for images"),
        (["eval", "segment", "RUN", "demo"], "segmentation is for images"),
        (["eval", "detect", "RUN", "demo"], "detection is for images"),
        (["export", "RUN", "--to=timm", "--out=x.safetensors"], "timm takes images, but"),
        (["eval", "knn", "IMAGES", "demo-video", "--compare", "RUN"], "they cannot be compared"),
    ],
)
def test_what_is_for_images_alone(command, words, clip_run, finished_run):
    known = {"RUN": clip_run.folder, "IMAGES": finished_run.folder}
    result = run_here(*[known.get(word, word) for word in command])
    assert_refused(result, words)

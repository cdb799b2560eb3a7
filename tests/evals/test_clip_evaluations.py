"""Evaluations of runs on clips, and of runs on images by the frames of clips."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, run_here
from PIL import Image

import hpm
from hpm.data.loader import evaluation_batches
from hpm.data.sources import open_source
from hpm.data.video.sampling import ClipSampling, ViewGrid
from hpm.evals.features import EvaluatedBackbone, ImageReader, extract, raw_patches, raw_pixels
from hpm.evals.loss_maps import LossMaps, hardness, object_views
from hpm.evals.metrics import mean_probabilities, mean_scores
from hpm.evals.neighbours import nearest_neighbours
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


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Two classes of 12 videos each, as folders of 12 frames of 24 x 16: a bright square that moves
    right or left over noise."""
    folder, rng = tmp_path_factory.mktemp("moving"), np.random.default_rng(0)
    for number in range(24):
        video = folder / ("right", "left")[number % 2] / f"{number:02d}"
        video.mkdir(parents=True)
        background, top = rng.integers(0, 90, (16, 24, 3)), rng.integers(0, 10)
        for time in range(12):
            frame = background.copy()
            left = time if number % 2 == 0 else 18 - time
            frame[top : top + 6, left : left + 6] = 220
            Image.fromarray(frame.astype(np.uint8)).save(video / f"{time:03d}.png")
    return folder


OPTIONS = {
    "knn": {"k": (5,)},
    "linear": {"epochs": 2},
    "attentive": {"epochs": 2},
    "stats": {},
    "hardness": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_evaluation_of_clips(name, clip_run, moving, tmp_path):
    run, options = str(clip_run.folder), OPTIONS[name] | {"workers": 0, "out": str(tmp_path)}
    result = hpm.evaluate(name, run, str(moving), **options)
    if name in ("knn", "stats", "hardness"):
        assert 0 <= result.hardness["ranking_accuracy"] <= 1
        assert "hard_on_objects" not in result.hardness  # these have no masks of objects
    if name == "hardness":
        return
    kinds = ["trained", "random weights"]
    if name != "attentive":
        kinds = [f"{kind}, {part}" for kind in kinds for part in ("class token", "patch mean")]
    assert list(result.values) == [*kinds, "raw pixels"]
    if name == "stats":
        tubes = result.values["trained, patch mean"]["stats"]
        assert 1 <= tubes["rank"] <= tubes["of"] and -1 <= tubes["patch_similarity"] <= 1
        return
    assert result.about["test_images"] == 4 and result.about["classes"] == 2
    again = hpm.evaluate(name, run, str(moving), segments=2, crops=3, **options)
    assert again.file != result.file and again.about["test_images"] == 4
    assert list(again.values) == list(result.values)


def test_the_predictor_is_measured_at_the_given_stride(clip_run, moving, tmp_path):
    options = {"workers": 0, "out": str(tmp_path)}
    trained, two, none = (
        hpm.evaluate("hardness", str(clip_run.folder), str(moving), frame_stride=stride, **options)
        for stride in (None, 2, 0)
    )
    assert trained.hardness == two.hardness != none.hardness


def test_hard_patches_on_the_objects_of_clips():
    """A predictor that knows the objects, and one that takes them for easy."""
    source, sampling = open_source("demo-video", clips=True).train, ClipSampling(4, 2)
    coverage = object_views(source, torch.arange(6), (32, 32), sampling=sampling)
    assert coverage.shape == (6, 4, 32, 32)
    by_tube = coverage.view(6, 2, 2, 4, 8, 4, 8).mean((2, 4, 6)).flatten(1)
    for sign in (1, -1):
        known = LossMaps(by_tube, by_tube, sign * by_tube)
        numbers = dict(hardness(known, coverage, (2, 8, 8)))
        chance = numbers["chance_on_objects"]
        assert chance == pytest.approx((by_tube >= 0.5).double().mean().item()) and chance > 0.02
        assert numbers["hard_on_objects"] == pytest.approx(4 * chance if sign == 1 else 0)


def test_an_attentive_probe_without_a_cache(clip_run, moving, tmp_path):
    """Features that are computed in each epoch: the same numbers, by several views as well."""
    options = {"epochs": 2, "workers": 0, "segments": 2, "crops": 2}
    run, data = str(clip_run.folder), str(moving)
    cached = hpm.evaluate("attentive", run, data, out=str(tmp_path / "a"), **options)
    options |= {"cache_gb": 1e-9}
    computed = hpm.evaluate("attentive", run, data, out=str(tmp_path / "b"), **options)
    assert computed.values == cached.values


def test_a_linear_probe_of_augmented_clips(clip_run, moving, tmp_path):
    options = {"epochs": 2, "workers": 0, "augment": True, "flip": "none", "crops": 2}
    result = hpm.evaluate("linear", str(clip_run.folder), str(moving), out=str(tmp_path), **options)
    assert 0 <= result.values["trained, patch mean"]["linear"]["top1"] <= 100


def test_scores_are_means_over_the_views(moving):
    """Against a loop over the views of each video; one that cannot be read has no part in it."""
    source = open_source(str(moving), clips=True).train
    grid, clip = ViewGrid(3, 2), ClipSampling(4, 2)
    reader = ImageReader(7, 0, lambda line: None, sampling=clip)
    labels, size = source.labels, (16, 16)

    def features(reader):
        def embed(clips):
            return {"pixels": clips.float().flatten(1)[:, ::97]}

        return extract(embed, source, labels, size, 3, reader)["pixels"]

    test = features(dataclasses.replace(reader, grid=grid))
    assert test.views == 6 and len(test.features) == 6 * 24 and len(test.labels) == 24
    ids = torch.tensor([3, 1])
    assert torch.equal(test.rows(ids)[:6], test.features[18:24])
    train = features(reader)
    ((_, together),) = nearest_neighbours(train, test, 2, (5,))
    similarity = torch.cosine_similarity(test.features[:, None], train.features[None], dim=-1)
    votes = torch.zeros(len(test.features), 2)
    for row, nearest in enumerate(similarity.topk(5).indices):
        for other in nearest:
            votes[row, train.labels[other]] += ((similarity[row, other] - 1) / 0.07).exp()
    summed = torch.stack([votes[6 * video : 6 * video + 6].sum(0) for video in range(24)])
    wrong = summed.argmax(1) != test.labels
    assert torch.equal(together.ranks, wrong.long())
    middle = dataclasses.replace(reader, grid=ViewGrid(1, 1))
    assert torch.equal(features(middle).features, train.features)


def test_means_of_scores():
    logits = torch.randn(6, 3)
    means = mean_probabilities(logits, 2)
    torch.testing.assert_close(means[1], (logits[2].softmax(0) + logits[3].softmax(0)) / 2)
    assert mean_scores(logits, 1) is logits and mean_probabilities(logits, 1) is logits


def test_an_image_encoder_is_named_as_the_mean_of_frames(finished_run, clip_run, moving, tmp_path):
    """The baseline of a run on clips, with which it can be compared in pairs."""
    options = {"k": (5,), "workers": 0, "out": str(tmp_path), "baselines": False}
    pooled = hpm.evaluate("knn", str(finished_run.folder), str(moving), frames=4, **options)
    assert list(pooled.values) == [
        "trained, class token, mean of frames",
        "trained, patch mean, mean of frames",
    ]
    runs = str(clip_run.folder), str(moving)
    both = hpm.evaluate("knn", *runs, compare=str(finished_run.folder), **options)
    assert list(both.values)[2:] == [name.replace("trained", "compared") for name in pooled.values]
    assert list(both.differences) == ["trained, class token", "trained, patch mean"]
    attentive = {"epochs": 1, "workers": 0, "out": str(tmp_path), "frames": 4}
    found = hpm.evaluate("attentive", str(finished_run.folder), str(moving), **attentive)
    kinds = ["trained, mean of frames", "random weights, mean of frames", "raw pixels"]
    assert list(found.values) == kinds


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
        (["eval", "knn", "IMAGES", "demo", "--segments=5"], "several views are of clips"),
        (
            ["eval", "linear", "RUN", "demo-video", "--crops=3", "--crop-share=0.9"],
            "leave crop_share out",
        ),
        (["eval", "knn", "RUN", "demo-video", "--segments=0"], "--segments is 0"),
        (
            ["eval", "finetune", "IMAGES", "demo-video", "--frames=4"],
            "a run of clips first",
        ),
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

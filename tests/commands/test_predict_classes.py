"""Classifiers taken away: files predicted, exported."""

import csv

import numpy as np
import pytest
import torch
from helpers import architecture_of, assert_refused, run_here
from videos import write_video

import hpm
from hpm.data.video.clips import ClipEvaluationViews
from hpm.data.video.sampling import ViewGrid
from hpm.data.video.sources import VideoFiles
from hpm.models.build import build_encoder
from hpm.weights.own import save_backbone

FRAMES = 4
FINETUNING = {
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
    "mixup": 0,
    "cutmix": 0,
    "rand_augment": "none",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten videos in two classes, of 13 to 22 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(10):
        write_video(folder / "ab"[number % 2] / f"{number}.mp4", frames=13 + number)
    return folder


@pytest.fixture(scope="module")
def classifier(videos, tmp_path_factory):
    """A fine-tuning on clips that VideoMAE can express."""
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "image_size": [FRAMES, 16, 16]}
    shape |= {"patch_size": [2, 8, 8], "channels": 3, "positions": "sincos_1d"}
    architecture = architecture_of(shape | {"class_token": False})
    folder = tmp_path_factory.mktemp("clips")
    weights = build_encoder(architecture, 0).state_dict()
    save_backbone(folder / "b.safetensors", weights, architecture, [0.5] * 3, [0.25] * 3)
    options = FINETUNING | {"frame_stride": 3, "out": str(folder / "out")}
    hpm.evaluate("finetune", str(folder / "b.safetensors"), str(videos), **options)
    (file,) = (folder / "out").rglob("classifier.safetensors")
    return file


def read(file):
    with file.open(newline="") as lines:
        head, *rows = csv.reader(lines)
    return head, {row[0]: (row[1], np.array(row[2:], float)) for row in rows}


def test_classes_of_videos(classifier, videos, tmp_path):
    """As the views of an evaluation, at the stride of the training; a file that cannot be read is
    named and passed over."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.mp4").write_bytes(
            (videos / "ab"[number % 2] / f"{number}.mp4").read_bytes()
        )
    (folder / "broken.mp4").write_bytes(b"nothing")
    options = ["--segments=2", "--crops=3", "--workers=0", "--max-unreadable=0.5"]
    result = run_here("predict", classifier, folder, "--out", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    assert "broken.mp4" in result.stdout + result.stderr
    head, rows = read(tmp_path / "out" / "predictions.csv")
    assert head == ["file", "class", "a", "b"]
    assert sorted(rows) == [f"{number}.mp4" for number in range(5)]
    model, grid = hpm.load_model(classifier), ViewGrid(2, 3)
    sampling = model.sampling()
    assert (sampling.frames, sampling.stride) == (FRAMES, 3)
    views = ClipEvaluationViews((16, 16), 3, sampling, grid=grid)
    source = VideoFiles("videos", [folder / "3.mp4"], root=folder)
    clips = np.stack([views(source, (0, 0, view))[0] for view in range(grid.count)])
    with torch.no_grad():
        expected = model(model.normalize(torch.from_numpy(clips))).softmax(1).mean(0)
    name, probabilities = rows["3.mp4"]
    assert name == model.classes[expected.argmax()]
    np.testing.assert_allclose(probabilities, expected, atol=2e-6)
    again = run_here("predict", classifier, folder, "--out", tmp_path / "out")
    assert_refused(again, "predictions.csv exists: choose another --out")


def test_classes_of_one_video(classifier, videos, tmp_path):
    out = tmp_path / "one.csv"
    result = run_here("predict", classifier.parent, videos / "a" / "0.mp4", "--out", out)
    assert result.returncode == 0, result.stderr
    assert list(read(out)[1]) == ["0.mp4"]


def test_classes_of_images(finished_run, image_folder, tmp_path):
    """The same classes as in the evaluation's test."""
    options = FINETUNING | {"epochs": 1}
    run, data = str(finished_run.folder), str(image_folder)
    result = hpm.evaluate("finetune", run, data, test=data, out=str(tmp_path / "out"), **options)
    (file,) = (tmp_path / "out").rglob("classifier.safetensors")
    hpm.predict(file, image_folder, tmp_path / "p.csv", workers=0)
    rows = read(tmp_path / "p.csv")[1]
    right = [name.startswith(f"{found}/") for name, (found, _) in rows.items()]
    assert 100 * np.mean(right) == pytest.approx(result.values["trained"]["finetune"]["top1"])
    refused = run_here("predict", file, image_folder, "--out", tmp_path / "q.csv", "--segments=2")
    assert_refused(refused, "is of images: leave --segments")
    refused = run_here("export", file, "--to", "hf", "--out", tmp_path / "hf")
    assert_refused(refused, "this classifier is of images, VideoMAE of clips")


def pixels(file):
    """Two clips uint8 [B C T H W], and the logits of the classifier."""
    model = hpm.load_model(file)
    clips = torch.randint(0, 256, (2, 3, FRAMES, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        return clips, model(model.normalize(clips))


def test_to_transformers(classifier, tmp_path):
    pytest.importorskip("transformers")
    said = []
    hpm.export(classifier.parent, "hf", tmp_path / "hf", said.append)
    clips, logits = pixels(classifier)
    variables = {"frames": [list(clip.transpose(0, 1).numpy()) for clip in clips]}
    exec(said[-1].partition("\n\n")[2], variables)
    torch.testing.assert_close(variables["logits"], logits, rtol=1e-5, atol=1e-5)
    assert list(variables["model"].config.id2label.values()) == ["a", "b"]
    again = hpm.load_model(tmp_path / "hf")
    assert again.classes == ["a", "b"]


def test_to_our_own_file(classifier, tmp_path):
    said = []
    out = hpm.export(classifier, "safetensors", tmp_path / "c.safetensors", said.append)
    clips, logits = pixels(classifier)
    variables = {"clips": clips}
    exec(said[-1].partition("\n\n")[2], variables)
    assert torch.equal(variables["logits"], logits)
    assert set(variables["labels"]) <= {"a", "b"}
    assert hpm.load_model(out).sampling().stride == 3
    refused = run_here("export", classifier, "--to", "timm", "--out", tmp_path / "t.safetensors")
    assert_refused(refused, "classifiers to onnx and safetensors")


@pytest.mark.slow
def test_to_onnx(classifier, tmp_path):
    pytest.importorskip("onnxruntime")
    said = []
    hpm.export(classifier, "onnx", tmp_path / "c.onnx", said.append)
    clips, logits = pixels(classifier)
    variables = {"pixels": (clips / 255).numpy()}
    exec(said[-1].partition("\n\n")[2], variables)
    np.testing.assert_allclose(variables["logits"], logits, rtol=1e-5, atol=1e-5)
    assert variables["labels"].tolist() == logits.argmax(1).tolist()


def test_a_folder_without_videos(classifier, tmp_path):
    (tmp_path / "none").mkdir()
    refused = run_here("predict", classifier, tmp_path / "none", "--out", tmp_path / "p.csv")
    assert_refused(refused, "no videos in this folder")

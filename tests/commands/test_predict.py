"""Segmenters taken away: loaded, predicted with, exported."""

import shutil

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from PIL import Image
from segmentation import model_in

import hpm
from hpm.data.segmentation import open_segmentation


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_predicted_masks_are_those_that_were_evaluated(head, request, scenes, tmp_path):
    out, result = request.getfixturevalue(f"{head}_segmenter")
    images = scenes / "val" / "images"
    predicted = run_here(
        "predict",
        model_in(out).parent,
        images,
        "--out",
        tmp_path / "masks",
        "--workers",
        0,
        "--device",
        "cpu",
    )
    assert predicted.returncode == 0, predicted.stderr
    model, test = hpm.load_model(model_in(out)), open_segmentation(str(scenes)).test
    hits = pixels = 0
    for index in range(len(test)):
        name = f"{index:02d}.png"
        with Image.open(tmp_path / "masks" / name) as mask:
            assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]
            mask = np.asarray(mask)
        assert np.array_equal(mask, model.predict(str(images / name)))
        labels = test.label_map(index)
        hits += (mask == labels)[labels != 255].sum()
        pixels += (labels != 255).sum()
    accuracy = result.values["trained"]["segment"]["pixel_accuracy"]
    assert 100 * hits / pixels == pytest.approx(accuracy)
    assert (tmp_path / "masks" / "classes.txt").read_text() == "background\nobject\n"
    again = run_here("predict", model_in(out), images, "--out", tmp_path / "masks")
    assert_refused(again, "exists: choose another --out")


def test_a_loaded_model(linear_segmenter, scenes):
    out, _ = linear_segmenter
    model = hpm.load_model(out)  # the trained one of two
    assert model.classes == ["background", "object"] and not model.training
    picture = str(scenes / "val" / "images" / "00.png")
    images = model.preprocess(picture)
    assert images.shape == (1, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (1, 2, 32, 32)
    assert torch.equal(model(model.preprocess(Image.open(picture))), logits)
    assert model.predict(np.zeros((20, 70, 3), np.uint8)).shape == (20, 70)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_onnx_gives_the_same(head, request, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    trained = model_in(request.getfixturevalue(f"{head}_segmenter")[0])
    model, lines = hpm.load_model(trained), []
    file = hpm.export(trained, "onnx", tmp_path / "s.onnx", lines.append)
    assert "the same outputs as ours" in lines[0] and "InferenceSession" in lines[1]
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(file))
    (logits,) = session.run(None, {"images": pixels.numpy()})
    expected = model((pixels - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_several_processes_are_refused(linear_segmenter, scenes, tmp_path, monkeypatch):
    """Each would read its share of the images, and one file would be written of that."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    images = scenes / "val" / "images"
    done = run_here("predict", model_in(linear_segmenter[0]), images, "--out", tmp_path / "masks")
    assert_refused(done, "predict runs in one process: do not use torchrun")
    assert not (tmp_path / "masks").exists()
    done = run_here("tokenize", images, "--out", tmp_path / "tokens.safetensors")
    assert_refused(done, "tokenize runs in one process: do not use torchrun")


def test_what_cannot_be_taken_away(linear_segmenter, scenes, finished_run, tmp_path):
    out, _ = linear_segmenter
    file = model_in(out)
    refused = run_here("export", file, "--to", "timm", "--out", tmp_path / "s.safetensors")
    assert_refused(refused, "segmenters are exported to onnx")
    assert_refused(run_here("predict", tmp_path, scenes, "--out", tmp_path / "m"), "holds no fine-")
    refused = run_here("predict", finished_run.backbone, scenes, "--out", tmp_path / "m")
    assert_refused(refused, "kind is 'hpm encoder', not a fine-tuned model")
    two = tmp_path / "two"
    for name in ("a", "b"):
        shutil.copytree(file.parent, two / name / "trained")
    shutil.copytree(file.parent, two / "a" / "random_weights")  # no choice beside trained models
    refused = run_here("predict", two, scenes, "--out", tmp_path / "m")
    assert_refused(refused, f"holds 2 models, name one of them: {two}/a/trained, {two}/b/trained")
    (tmp_path / "none").mkdir()
    refused = run_here("predict", file, tmp_path / "none", "--out", tmp_path / "m")
    assert_refused(refused, "no images in this folder")
    twins = tmp_path / "twins"
    twins.mkdir()
    for suffix in ("png", "jpg"):
        Image.new("RGB", (8, 8)).save(twins / f"a.{suffix}")
    refused = run_here("predict", file, twins, "--out", tmp_path / "m")
    assert_refused(refused, "would have one mask")

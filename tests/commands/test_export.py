"""Exports: each is loaded by its library and compared, here once more and apart from the code."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, architecture_of, assert_refused, run_here, run_hpm
from PIL import Image
from safetensors.torch import load_file

import hpm
from hpm.commands.model_card import Results, card
from hpm.commands.options import ExportConfig
from hpm.core.extras import need
from hpm.data.loader import normalize
from hpm.data.transforms import evaluation_view
from hpm.show.run import Run
from hpm.weights.export_format import ExportSource
from hpm.weights.formats import WRITABLE
from hpm.weights.resolve import load, save_backbone

transformers = need("transformers", "hf", "the test")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def ours(finished_run):
    with torch.no_grad():
        return hpm.load_encoder(finished_run.folder)(IMAGES)


def lines_of(said: list[str]) -> str:
    """What is printed to paste."""
    return said[-1].partition("\n\n")[2]


def pasted(said, **names):
    """The variables after running the printed lines."""
    with torch.no_grad():
        exec(lines_of(said), names)
    return names


def close(theirs, ours):
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 1e-5


def backbone_of(shape, path, channels=3, model=None):
    """A random backbone file of another geometry."""
    from hpm.models.build import build_encoder

    architecture = architecture_of(shape)
    encoder = build_encoder(architecture, seed=0)
    save_backbone(path, encoder.state_dict(), architecture, [0.5] * channels, [0.25] * channels)
    return path


OBLONG = {
    "image_size": [8, 16],
    "patch_size": [4, 4],
    "channels": 3,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
}


def test_timm(finished_run, ours, tmp_path):
    said = []
    out = hpm.export(finished_run.folder, "timm", tmp_path / "x.safetensors", said.append)
    assert os.listdir(tmp_path) == ["x.safetensors"] and out == tmp_path / "x.safetensors"
    assert "outputs agree with ours to" in said[0]
    names = pasted(said, images=IMAGES)
    close(names["pooled"], ours[0])
    close(names["patches"], ours[1])


def test_timm_with_the_class_token_of_the_teacher(finished_run, tmp_path):
    said = []
    out = tmp_path / "x.safetensors"
    hpm.export(finished_run.folder, "timm", out, said.append, teacher=True, pool="cls")
    encoder = hpm.load_encoder(finished_run.folder, pool="cls", teacher=True)
    close(pasted(said, images=IMAGES)["pooled"], encoder(IMAGES)[0])


def test_oblong_images_of_seven_channels_for_timm(tmp_path):
    path = backbone_of(OBLONG | {"channels": 7}, tmp_path / "run.safetensors", 7)
    said = []
    hpm.export(path, "timm", tmp_path / "x.safetensors", said.append)
    images = torch.randn(2, 7, 8, 16)
    close(pasted(said, images=images)["patches"], hpm.load_encoder(path)(images)[1])


def test_hugging_face(finished_run, ours, tmp_path):
    out = hpm.export(finished_run.folder, "hf", tmp_path / "hf")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} == set(
        os.listdir(out)
    )
    model, report = transformers.AutoModel.from_pretrained(
        str(out), add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values())
    tokens = model.eval()(IMAGES).last_hidden_state
    close(tokens[:, 1:], ours[1])
    processor = transformers.AutoImageProcessor.from_pretrained(str(out))
    trained = load(finished_run.folder)
    assert list(processor.image_mean) == trained.mean
    assert list(processor.image_std) == trained.std
    pixels = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    normalised = processor(pixels, return_tensors="pt").pixel_values
    close(
        model(normalised).last_hidden_state[:, 1:],
        hpm.load_encoder(finished_run.folder)(pixels[None])[1],
    )


def test_an_oblong_model_for_hugging_face(tmp_path):
    path = backbone_of(OBLONG, tmp_path / "run.safetensors")
    hpm.export(path, "hf", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["image_size"] == [8, 16]


def test_hugging_face_with_the_decoder(finished_run, tmp_path):
    out = hpm.export(finished_run.folder, "hf", tmp_path / "hf", with_decoder=True)
    model, report = transformers.ViTMAEForPreTraining.from_pretrained(
        str(out), output_loading_info=True
    )
    assert not any(report.values()) and model.config.norm_pix_loss
    noise = torch.rand(2, 16)
    theirs = model.eval()(IMAGES, noise=noise)
    trained = load(finished_run.folder)
    trained.model.eval()
    order = noise.argsort(dim=1)
    visible_ids, hidden_ids = order[:, :4], order[:, 4:]
    prediction, _ = trained.model(IMAGES, visible_ids, hidden_ids)
    close(theirs.logits.gather(1, hidden_ids[..., None].expand_as(prediction)), prediction)
    # The loss is ours as well: HPM's target is MAE's.
    target = trained.find_target(torch.device("cpu"))
    targets = target(IMAGES, None).gather(1, hidden_ids[..., None].expand_as(prediction))
    assert theirs.loss.item() == pytest.approx(
        target.patch_loss(prediction, targets).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("to", ["timm", "torchvision"])
def test_the_normalisation_is_printed(finished_run, tmp_path, to):
    said = []
    hpm.export(finished_run.folder, to, tmp_path / "x.safetensors", said.append)
    printed = re.findall(r"(?:mean|deviation) (\[.*?\])", lines_of(said))
    mean, std = map(json.loads, printed)
    trained = load(finished_run.folder)
    assert mean == pytest.approx(trained.mean, rel=1e-4)
    assert std == pytest.approx(trained.std, rel=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_torchvision(finished_run, ours, tmp_path, suffix):
    said = []
    hpm.export(finished_run.folder, "torchvision", tmp_path / f"x{suffix}", said.append)
    names = pasted(said, images=IMAGES)
    close(names["cls_token"], hpm.load_encoder(finished_run.folder, pool="cls")(IMAGES)[0])


@pytest.mark.slow
def test_onnx_in_a_process_of_its_own(finished_run, ours, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "x.onnx"
    result = run_hpm("export", finished_run.folder, "--to", "onnx", "--out", out)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["x.onnx"]
    trained = load(finished_run.folder)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (trained.mean, trained.std))
    code = result.stdout.partition("to load it:\n\n")[2]
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        names = {"pixels": (images * std + mean).numpy()}
        exec(code, names)
        pooled, patches = hpm.load_encoder(finished_run.folder)(images)
        close(torch.from_numpy(names["pooled"]), pooled)
        close(torch.from_numpy(names["patches"]), patches)


def test_our_own_file(finished_run, ours, tmp_path):
    said = []
    hpm.export(finished_run.folder, "safetensors", tmp_path / "x.safetensors", said.append)
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]
    close(pasted(said, images=IMAGES)["patches"], ours[1])


def test_in_a_fresh_process(finished_run, ours, tmp_path):
    """The printed lines are all that is needed; hpm only mends a torchvision of another build."""
    said = []
    hpm.export(finished_run.folder, "timm", tmp_path / "x.safetensors", said.append)
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import torch; from hpm.core.extras import need; need('timm', '', '')\n"
        f"images = torch.load({str(tmp_path / 'images.pt')!r})\n{lines_of(said)}\n"
        f"torch.save(pooled.detach(), {str(tmp_path / 'pooled.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    close(torch.load(tmp_path / "pooled.pt"), ours[0])


TIMM = {
    "image_size": [32, 32],
    "patch_size": [16, 16],
    "channels": 3,
    "embed_dim": 192,
    "depth": 12,
    "class_token": True,
}


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"],
)
def test_encoders_of_timm(tmp_path, name):
    patch = 14 if "14" in name else 16
    sizes = {"image_size": [2 * patch, 2 * patch], "patch_size": [patch, patch]}
    path = backbone_of(TIMM | sizes | {"model": f"timm/{name}"}, tmp_path / "run.safetensors")
    said = []
    hpm.export(path, "timm", tmp_path / "x.safetensors", said.append)
    images = torch.randn(1, 3, 2 * patch, 2 * patch)
    close(pasted(said, images=images)["patches"], hpm.load_encoder(path)(images)[1])


@pytest.mark.parametrize("to", ["torchvision", "hf"])
def test_an_encoder_without_class_token_goes_to_timm(tmp_path, to):
    shape = OBLONG | {"image_size": [16, 16], "class_token": False}
    path = backbone_of(shape, tmp_path / "run.safetensors")
    said = []
    hpm.export(path, "timm", tmp_path / "x.safetensors", said.append)
    names, ours = pasted(said, images=IMAGES), hpm.load_encoder(path)(IMAGES)
    close(names["pooled"], ours[0])
    close(names["patches"], ours[1])
    out = tmp_path / {"torchvision": "y.safetensors", "hf": "hf"}[to]
    reason = "has one class token, and this encoder has none: pass --to timm, onnx or safetensors"
    with pytest.raises(hpm.UserError, match=reason):
        hpm.export(path, to, out)
    assert not out.exists()


@pytest.mark.slow
def test_a_hiera_goes_to_timm_and_not_elsewhere(tmp_path):
    hiera = {
        "model": "timm/hiera_tiny_224",
        "image_size": [64, 64],
        "patch_size": [32, 32],
        "channels": 3,
        "embed_dim": 768,
        "depth": 12,
        "class_token": False,
    }
    path = backbone_of(hiera, tmp_path / "run.safetensors")
    said = []
    hpm.export(path, "timm", tmp_path / "x.safetensors", said.append)
    images = torch.randn(1, 3, 64, 64)
    names = pasted(said, images=images)
    close(names["pooled"], hpm.load_encoder(path)(images)[0])
    before = sorted(os.listdir(tmp_path))
    for to, out in (("hf", "hf"), ("torchvision", "y.safetensors")):
        with pytest.raises(hpm.UserError, match="cannot express timm/hiera_tiny_224"):
            hpm.export(path, to, tmp_path / out)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"to": "torchvision", "out": "x.pth"}, "square images and patches alone"),
        (
            {"image_size": [8, 8], "channels": 5},
            {"to": "torchvision", "out": "x.pth"},
            "takes 3 channels alone, and this encoder has 5",
        ),
        ({}, {"to": "timm", "out": "x.onnx"}, "name a .safetensors file"),
        ({}, {"to": "tim", "out": "x"}, "did you mean 'timm'"),
        ({}, {"to": "timm", "out": "x.safetensors", "teacher": True}, "backbone only, no teacher"),
        ({}, {"to": "hf", "out": "x", "with_decoder": True}, "backbone only, no decoder"),
        ({}, {"to": "timm", "out": "x.safetensors", "with_decoder": True}, "only with --to hf"),
        ({}, {"to": "hf", "out": "x", "push": "me/it"}, "pass --licence"),
        ({}, {"to": "hf", "out": "x", "push": "it", "licence": "mit"}, "write USER/NAME"),
        ({}, {"to": "timm", "out": "run.safetensors"}, "exists: choose another --out"),
        ({}, {"to": "hf", "out": "x", "public": True}, "public works only with --push"),
        ({}, {"to": "timm", "out": "x.safetensors", "with_figure": True}, "needs a model card"),
        ({}, {"to": "hf", "out": "x", "with_figure": True}, "has no figures: leave it out"),
        ({}, {"to": "hf", "out": "x", "crop_share": 0.5}, "square images alone"),
        ({}, {"to": "hf", "out": "x", "crop_share": 1.5}, "crop_share is 1.5"),
    ],
)
def test_what_is_refused(tmp_path, changes, options, reason):
    architecture = OBLONG | changes
    path = backbone_of(architecture, tmp_path / "run.safetensors", architecture["channels"])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(hpm.UserError, match=reason) as caught:
        hpm.export(path, options.pop("to"), tmp_path / options.pop("out"), **options)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def finetuned(tmp_path):
    """A segmenter and a classifier of random weights."""
    from hpm.models.build import build_classifier, build_encoder
    from hpm.models.segmenter import LinearSegmenter
    from hpm.weights.classification import ClassificationModel, write_classifier
    from hpm.weights.segmentation import SegmentationModel

    architecture, moments = (
        architecture_of(OBLONG | {"image_size": [16, 16]}),
        ([0.5] * 3, [0.3] * 3),
    )
    folder = tmp_path / "finetuned"
    folder.mkdir()
    segmenter = LinearSegmenter(build_encoder(architecture, seed=0), 2)
    SegmentationModel(segmenter, architecture, ["a", "b"], *moments, 16).save(
        folder / "s.safetensors"
    )
    classifier = build_classifier(architecture, None, 2)
    model = ClassificationModel(classifier, architecture, ["a", "b"], *moments)
    write_classifier(model, folder / "c.safetensors")
    return folder


@pytest.mark.parametrize("name", ["s", "c"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("teacher", True), ("pool", "cls"), ("with_decoder", True), ("with_figure", True)],
)
def test_finetuned_models_have_no_options_of_a_backbone(finetuned, tmp_path, name, option, value):
    options = {option: value, "push": "me/it", "licence": "mit"}
    reason = f"^{option} is for backbones, but .*{name}.safetensors is a fine-tuned model: leave"
    with pytest.raises(hpm.UserError, match=reason):
        hpm.export(finetuned / f"{name}.safetensors", "onnx", tmp_path / "x.onnx", **options)
    assert os.listdir(tmp_path) == ["finetuned"]


def test_segmenters_are_not_uploaded(finetuned, tmp_path):
    options = {"push": "me/it", "licence": "mit"}
    with pytest.raises(hpm.UserError, match="push does not take segmenters: leave it out"):
        hpm.export(finetuned / "s.safetensors", "onnx", tmp_path / "x.onnx", **options)
    assert os.listdir(tmp_path) == ["finetuned"]


def test_feature_targets_have_no_decoder_for_hugging_face(finished_run, tmp_path, monkeypatch):
    trained = load(finished_run.folder)
    trained.config.target = "hog"
    monkeypatch.setattr("hpm.commands.export.load", lambda run: trained)
    with pytest.raises(hpm.UserError, match="reconstructs pixels, but the target of this run is"):
        hpm.export(finished_run.folder, "hf", tmp_path / "hf", with_decoder=True)


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_a_failing_export_leaves_nothing(finished_run, tmp_path, monkeypatch, to):
    kind, out = type(WRITABLE[to]), tmp_path / "new" / "x.safetensors"
    right = kind.outputs
    monkeypatch.setattr(kind, "outputs", lambda *a: {n: t + 1e-3 for n, t in right(*a).items()})
    with pytest.raises(hpm.UserError, match=r"pooled differ from ours by 1.0e-03 \(1e-05"):
        hpm.export(finished_run.folder, to, out)
    monkeypatch.setattr(kind, "outputs", lambda *a: {"patches": right(*a)["patches"] * torch.nan})
    with pytest.raises(hpm.UserError, match="patches differ from ours by nan"):
        hpm.export(finished_run.folder, to, out)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, "outputs", fail)
    with pytest.raises(hpm.UserError, match="no space left"):
        hpm.export(finished_run.folder, to, out)
    assert os.listdir(tmp_path / "new") == []


def test_a_missing_library_names_its_extra(finished_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(hpm.UserError, match=r"pip install 'hpm-vision\[onnx\]'"):
        hpm.export(finished_run.folder, "onnx", tmp_path / "x.onnx")
    assert os.listdir(tmp_path) == []


def test_the_command_line(finished_run, tmp_path):
    result = run_here("export", finished_run.folder, "--to", "tensorflow", "--out", tmp_path / "x")
    assert_refused(result, "to is 'tensorflow'", "onnx")


@pytest.fixture
def evaluated(finished_run, tmp_path_factory):
    """A copy of the run with numbers of evaluations beside it."""
    run = Run(tmp_path_factory.mktemp("evaluated") / "finished")
    shutil.copytree(finished_run.folder, run.folder, ignore=shutil.ignore_patterns("evals"))
    folder = run.folder / "evals"
    content = {
        "protocol": "knn",
        "about": {"data": "somewhere/flowers", "weights": "student", "step": TINY["steps"]},
        "values": {"trained": {"k = 20": {"top1": 52.31, "top1_low": 49.0, "top1_high": 55.5}}},
        "hardness": {"ranking_accuracy": 0.86},
    }
    folder.mkdir()
    (folder / "knn_test.json").write_text(json.dumps(content))
    (folder / "odd.json").write_text("{")
    others = {"student_before": {"step": 4}, "teacher": {"weights": "teacher"}}
    for number, (name, changes) in enumerate(others.items()):
        numbers = {"top1": 11.0 + number, "top1_low": 1.0, "top1_high": 99.0}
        other = content | {"about": content["about"] | changes | {"crop_share": 0.875}}
        other |= {"values": {"trained": {"k = 20": numbers}, "compared": {"k = 20": numbers}}}
        (folder / f"{name}.json").write_text(json.dumps(other))
    old = content | {"about": {"data": "somewhere/flowers"}}
    (folder / "of_an_older_version.json").write_text(json.dumps(old))
    return run


def test_the_model_card(evaluated, tmp_path):
    said = []
    options = {"licence": "cc-by-4.0", "with_figure": True}
    out = hpm.export(evaluated.folder, "hf", tmp_path / "hf", said.append, **options)
    text = (out / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "license: cc-by-4.0" in front and "library_name: transformers" in front
    for words in (
        "arxiv.org/abs/2304.05919",
        "| knn, k = 20 | flowers | trained | top-1 52.3 (49.0 to 55.5) |",
        "| predictor and teacher | flowers |  | ranking accuracy 0.86 |",
        "| odd.json |  |  | unreadable |",
        "easy_to_hard, 0.75 of the patches",
        f"{TINY['steps']} steps of batches of 8",
        "add_pooling_layer=False",
        "## Licence\n\ncc-by-4.0",
    ):
        assert words in body, words
    assert str(Path(evaluated.folder).parent) not in body.partition("## Training")[2]
    assert "![" in body and (out / "figure.png").stat().st_size > 0
    assert body.count("| knn") == 1 and any("left out" in line and "3" in line for line in said)


def test_the_card_shows_what_was_measured_on_these_weights(evaluated, tmp_path):
    """Not what the student could, nor what a step before could; no picture unasked."""
    out = hpm.export(evaluated.folder, "hf", tmp_path / "hf", teacher=True)
    text = (out / "README.md").read_text()
    assert "| knn, k = 20, crop_share 0.875 | flowers | trained | top-1 12.0" in text
    assert text.count("| knn") == 1 and "compared" not in text
    assert "![" not in text and not (out / "figure.png").exists()


@pytest.mark.parametrize(
    ("mine_by", "words"),
    [
        ("teacher", "a teacher predicts how badly each patch will be reconstructed"),
        ("memory", "masks follow from the losses of each image's patches in earlier epochs"),
        ("progress", "masks follow from how much the losses of each image's patches fell"),
    ],
)
def test_the_card_says_what_the_masks_follow_from(mine_by, words, finished_run):
    trained = load(finished_run.folder)
    trained.config = dataclasses.replace(trained.config, mine_by=mine_by)
    config = ExportConfig("run", "hf", "out")
    text = card(ExportSource(trained, trained.backbone(), None), config, "", False, Results())
    assert words in text and ("a teacher predicts" in text) == (mine_by == "teacher")


def test_an_evaluation_says_of_which_weights_it_is(finished_run, image_folder, tmp_path):
    options = {"workers": 0, "k": (1,), "baselines": False, "out": str(tmp_path)}
    for teacher in (False, True):
        result = hpm.evaluate(
            "knn", str(finished_run.folder), str(image_folder), teacher=teacher, **options
        )
        about = json.loads(result.file.read_text())["about"]
        assert (about["step"], about["weights"]) == (TINY["steps"], ["student", "teacher"][teacher])
    first = finished_run.checkpoints / "step_00000004.safetensors"
    result = hpm.evaluate("knn", str(first), str(image_folder), **options)
    assert result.about["step"] == 4


def in_units_of_255(difference, std):
    return (difference * torch.tensor(std).view(-1, 1, 1)).abs() * 255


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("share", [1.0, 0.875])
def test_pixels_are_those_of_an_evaluation(tmp_path, backend, share):
    """To 1 of 255 where the margins are whole pixels; else to one pixel of the resized image."""
    architecture = OBLONG | {"image_size": [56, 56]}
    path = backbone_of(architecture, tmp_path / "run.safetensors")
    out = hpm.export(path, "hf", tmp_path / "hf", crop_share=share)
    processor = transformers.AutoImageProcessor.from_pretrained(str(out), backend=backend)
    mean, std = torch.tensor([0.5] * 3), torch.tensor([0.25] * 3)

    def difference(image):
        theirs = processor(image, return_tensors="pt").pixel_values
        view = evaluation_view(image, (56, 56), 3, crop_share=share)
        ours = normalize(torch.from_numpy(view)[None], mean, std)
        assert theirs.shape == ours.shape
        return in_units_of_255(theirs - ours, [0.25] * 3)[0]

    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (25, 25, 3), np.uint8))
    assert difference(noise.resize((300, 300))).max() < 1.01
    if share < 1:
        assert difference(noise.resize((240, 120))).max() < 1.01
    for width, height in ((375, 500), (376, 500), (500, 333), (401, 57)):
        rows, columns = np.mgrid[:height, :width] * (255 / max(width, height))
        ramp = Image.fromarray(np.stack([rows, columns, rows], -1).round().astype(np.uint8))
        pixel = min(width, height) / (56 / share) * 255 / max(width, height)
        assert difference(ramp).max() < pixel + 2, (width, height)


def test_photographs_are_preprocessed_as_evaluated(tmp_path, shared_data):
    path = backbone_of(OBLONG | {"image_size": [224, 224]}, tmp_path / "run.safetensors")
    out = hpm.export(path, "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(str(out))
    differences = []
    for file in sorted((shared_data / "photos").glob("*.JPEG"))[:12]:
        image = Image.open(file).convert("RGB")
        theirs = processor(image, return_tensors="pt").pixel_values[0] * 0.25 + 0.5
        ours = torch.from_numpy(evaluation_view(image, (224, 224), 3)) / 255
        differences.append((theirs - ours).abs().mean().item())
    assert max(differences) < 0.03, differences  # of full scale; squashed to a square: 0.06 to 0.22


def test_pushing(evaluated, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def create_repo(name, **options):
        calls.append(("create", name, options))
        return f"https://hub/{name}"

    def upload_folder(**options):
        folder = Path(options.pop("folder_path"))
        calls.append(("upload", sorted(p.name for p in folder.iterdir()), options))
        calls.append((folder / "README.md").read_text())

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: True)
    said = []
    out = tmp_path / "x.safetensors"
    options = {"push": "me/flowers", "licence": "mit"}
    hpm.export(evaluated.folder, "timm", out, said.append, **options)
    assert calls[0] == ("create", "me/flowers", {"exist_ok": True, "private": True})
    kind, files, given = calls[1]
    assert (kind, files) == ("upload", ["README.md", "x.safetensors"])
    assert given["repo_id"] == "me/flowers"
    assert 'checkpoint_path="x.safetensors"' in calls[2] and "license: mit" in calls[2]
    assert said[-1] == "uploaded to https://hub/me/flowers"

    calls.clear()
    shown = {"public": True, "with_figure": True}
    monkeypatch.chdir(tmp_path)
    hpm.export(evaluated.folder, "hf", "./model/", said.append, **options, **shown)
    assert calls[0][2]["private"] is False and "figure.png" in calls[1][1]
    assert "config.json" in calls[1][1]
    # The card loads from the hub; the lines that are printed, from the folder.
    assert 'processor = AutoImageProcessor.from_pretrained("me/flowers")' in calls[2]
    assert 'model = AutoModel.from_pretrained("me/flowers", ' in calls[2]
    assert any('model = AutoModel.from_pretrained("model", ' in line for line in said)

    def refuse(name, **options):
        raise ValueError("no such user\nor no token")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(hpm.UserError, match="could not be uploaded: no such user or no token"):
        hpm.export(evaluated.folder, "hf", tmp_path / "hf2", said.append, **options)
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: False)
    with pytest.raises(hpm.UserError, match="cannot be reached"):
        hpm.export(evaluated.folder, "hf", tmp_path / "hf3", said.append, **options)


def test_names_survive_the_way_there_and_back(finished_run):
    from hpm.weights.hugging_face import HuggingFaceMae, to_hugging_face
    from hpm.weights.resolve import recognise

    model = load(finished_run.folder).model
    left = ("predictor.", "predictor_embed.")
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(left)}
    theirs = to_hugging_face(state)
    assert type(recognise(theirs)) is HuggingFaceMae
    back, left_over = HuggingFaceMae().to_ours(theirs)
    assert not left_over and back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_file_reads_as_plain_safetensors(finished_run, tmp_path):
    hpm.export(finished_run.folder, "timm", tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    assert state.keys() == load(finished_run.folder).encoder.state_dict().keys()

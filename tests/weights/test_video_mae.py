"""transformers' VideoMAE: equal outputs both ways, and what cannot be expressed."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY, architecture_of, assert_refused, run_here
from PIL import Image
from safetensors.torch import load_file, save_file

import hpm
from hpm.core import files
from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.core.files import write_tensors
from hpm.models.build import build_classifier, build_model
from hpm.weights.initialise import initialise
from hpm.weights.resolve import load, recognise
from hpm.weights.video_mae import VideoMae, VideoMaeForPreTraining, to_video_mae

transformers = need("transformers", "hf", "the test")

CLIPS = torch.randn(2, 3, 4, 16, 24, generator=torch.Generator().manual_seed(4))
FRAMES_FIRST = CLIPS.transpose(1, 2)
PATCHES, HIDDEN = 2 * 4 * 6, 40
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": [16, 24],
    "patch_size": 4,
    "num_frames": 4,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}
OURS = {
    "image_size": [4, 16, 24],
    "patch_size": [2, 4, 4],
    "channels": 3,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "positions": "sincos_1d",
    "class_token": False,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "with_predictor": False,
}
ASSUMED_STRIDE = "its clips have a frame stride of 4 (assumed)"


def close(theirs, ours):
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 1e-5


def theirs(kind, folder, **changes):
    """A random model of transformers, saved; all its biases and norms are random as well."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.VideoMAEConfig(**SHAPE | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.1)
    model.save_pretrained(folder)
    moments = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(moments))
    return model


def a_mask():
    """(mask, ids of the visible patches, ids of the hidden ones)."""
    order = torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(5)).argsort(1)
    visible, hidden = order[:, HIDDEN:].sort(1).values, order[:, :HIDDEN].sort(1).values
    return torch.zeros(2, PATCHES).scatter(1, hidden, 1).bool(), visible, hidden


@pytest.mark.parametrize(
    "changes", [{}, {"use_mean_pooling": False}, {"qv_bias": False}], ids=["", "norm", "no_bias"]
)
def test_reading_an_encoder(tmp_path, changes):
    model = theirs("VideoMAEModel", tmp_path, **changes)
    trained = load(tmp_path)
    pooled, patches = trained.backbone().eval()(CLIPS)
    expected = model(FRAMES_FIRST).last_hidden_state
    close(expected, patches)
    close(expected.mean(1), pooled)
    assert trained.mean == [0.1, 0.2, 0.3] and trained.architecture.num_heads == 4
    assert [note for note in trained.notes if "assumed" in note] == [ASSUMED_STRIDE]


@pytest.mark.parametrize("changes", [{}, {"norm_pix_loss": False}, {"use_mean_pooling": False}])
def test_reading_a_model_with_its_decoder(tmp_path, changes):
    """The same reconstruction, and the same loss, whose target VideoMAE computes by itself."""
    model = theirs("VideoMAEForPreTraining", tmp_path, **changes)
    trained = load(tmp_path)
    mask, visible, hidden = a_mask()
    prediction = trained.model.eval()(CLIPS, visible, hidden)[0]
    mean, std = (torch.tensor(v).repeat(32) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    raw = changes.get("norm_pix_loss") is False
    output = model(FRAMES_FIRST, bool_masked_pos=mask)
    close(output.logits, prediction * std + mean if raw else prediction)
    assert trained.config.target == ("pixels" if raw else "normalized_channels")
    assert (trained.config.frames, trained.config.mask, trained.config.mask_ratio) == (
        4,
        "tube",
        0.9,
    )
    target = trained.find_target(torch.device("cpu"))
    wanted = target(CLIPS).gather(1, hidden[..., None].expand_as(prediction))
    error = (prediction - wanted).square()
    if raw:
        error = error * std.square()
    assert output.loss.item() == pytest.approx(error.mean().item(), rel=1e-3)


def test_reading_a_classifier(tmp_path, monkeypatch):
    names = ["running", "jumping", "sitting"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = theirs("VideoMAEForVideoClassification", tmp_path, **labels)
    with monkeypatch.context() as patch:
        opened = []
        open_file = files.safe_open
        patch.setattr(
            files, "safe_open", lambda path, **how: opened.append(path) or open_file(path, **how)
        )
        found = hpm.load_model(tmp_path)
    assert opened == [tmp_path / "model.safetensors"]  # once, encoder and head
    close(model(FRAMES_FIRST).logits, found(CLIPS))
    assert found.classes == names and not found.training
    # As a backbone, each token is normalised, and not their mean.
    patches = hpm.load_encoder(tmp_path)(CLIPS)[1]
    tokens = model.videomae(FRAMES_FIRST).last_hidden_state
    norm = torch.nn.functional.layer_norm(
        tokens, (32,), model.fc_norm.weight, model.fc_norm.bias, 1e-6
    )
    close(norm, patches)
    # There and back.
    hpm.export(tmp_path, "hf", tmp_path / "backbone")
    own = tmp_path / "classifier.safetensors"
    about = {"kind": "hpm classifier", "architecture": found.architecture.to_json(), "pool": "mean"}
    about |= {"classes": names, "mean": found.mean.tolist(), "std": found.std.tolist()}
    write_tensors(own, found.classifier.state_dict(), about)
    said = []
    out = hpm.export(own, "hf", tmp_path / "out", said.append)
    back, report = transformers.VideoMAEForVideoClassification.from_pretrained(
        str(out), output_loading_info=True
    )
    assert not any(report.values()) and list(back.config.id2label.values()) == names
    assert "video-classification" in (out / "README.md").read_text()
    code = said[-1].partition("\n\n")[2]
    assert "model.fc_norm.eps = 1e-06" in code
    variables = {"frames": [frame.numpy() for frame in uint8_clips(1)[0].transpose(0, 1)]}
    exec(code, variables)
    expected = hpm.load_model(own)
    close(variables["logits"], expected(expected.normalize(uint8_clips(1))))


def uint8_clips(count):
    generator = torch.Generator().manual_seed(6)
    return torch.randint(256, (count, 3, 4, 16, 24), dtype=torch.uint8, generator=generator)


def test_older_and_newer_names():
    """transformers writes q_bias and v_bias; its own modules have query.bias and value.bias."""
    prefix = "videomae.encoder.layer.0.attention.attention."
    state = {f"{prefix}{part}.weight": torch.zeros(4, 4) for part in ("query", "key", "value")}
    older = {f"{prefix}q_bias": torch.ones(4), f"{prefix}v_bias": 3 * torch.ones(4)}
    newer = {f"{prefix}query.bias": torch.ones(4), f"{prefix}value.bias": 3 * torch.ones(4)}
    for biases in (older, newer):
        ours, unused = VideoMae().to_ours(state | biases)
        bias = ours["encoder.blocks.0.attn.qkv.bias"]
        assert bias.tolist() == [1] * 4 + [0] * 4 + [3] * 4 and not unused


def test_names_survive_the_way_there_and_back():
    state = build_model(architecture_of(OURS)).state_dict()
    found = to_video_mae(dict(state))
    assert type(recognise(found)) is VideoMaeForPreTraining
    assert type(recognise(n for n in found if "decoder" not in n)) is VideoMae
    back, unused = VideoMaeForPreTraining().to_ours(found)
    fixed = {"encoder.pos_embed", "decoder_pos_embed", "decoder_embed.bias"}
    assert not unused and back.keys() | fixed == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in back.keys() - fixed)


# From a run, as a user goes.


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    options = {
        "frames": 4,
        "frame_stride": 2,
        "patch_size": (2, 4, 4),
        "image_size": (16, 24),
        "normalize": "imagenet",
    }
    options |= {"positions": "sincos_1d", "class_token": False, "target": "normalized_channels"}
    out = tmp_path_factory.mktemp("runs") / "clips"
    return hpm.pretrain(data="demo-video", out=str(out), **TINY | {"steps": 3} | options)


def test_exporting_an_encoder(clip_run, tmp_path):
    said = []
    out = hpm.export(clip_run.folder, "hf", tmp_path / "hf", said.append)
    model, report = transformers.AutoModel.from_pretrained(str(out), output_loading_info=True)
    assert type(model).__name__ == "VideoMAEModel" and not any(report.values())
    encoder, clips = hpm.load_encoder(clip_run.folder), uint8_clips(2)
    variables = {"frames": [list(clip.transpose(0, 1).numpy()) for clip in clips]}
    with torch.no_grad():
        exec(said[-1].partition("\n\n")[2], variables)
        pooled, patches = encoder(clips)
    close(variables["tokens"], patches)
    close(variables["pooled"], pooled)
    close(hpm.load_encoder(out)(clips)[1], patches)
    assert (
        "for clips of 4 x 16 x 24 pixels in patches of 2 x 4 x 4" in (out / "README.md").read_text()
    )


@pytest.mark.parametrize("target", ["normalized_channels", "pixels"])
def test_exporting_a_model_with_its_decoder(clip_run, tmp_path, monkeypatch, target):
    trained = load(clip_run.folder)
    trained.config.target = target
    assert trained.model.decoder_embed.bias.abs().max() > 1e-4  # VideoMAE has none
    monkeypatch.setattr("hpm.commands.export.load", lambda run: trained)
    said = []
    out = hpm.export(clip_run.folder, "hf", tmp_path / "hf", said.append, with_decoder=True)
    model, report = transformers.VideoMAEForPreTraining.from_pretrained(
        str(out), output_loading_info=True
    )
    assert not any(report.values())
    assert "model.decoder.norm.eps = 1e-06" in said[-1]
    mask, visible, hidden = a_mask()
    prediction = trained.model.eval()(CLIPS, visible, hidden)[0]
    model.eval().decoder.norm.eps = 1e-6
    found = model(FRAMES_FIRST, bool_masked_pos=mask)
    # The loss is ours as well.
    target = trained.find_target(torch.device("cpu"))
    wanted = target(CLIPS).gather(1, hidden[..., None].expand_as(prediction))
    error = (prediction - wanted).square()
    if not target.normalized:
        error = error * torch.tensor([0.229, 0.224, 0.225]).repeat(32).square()
    else:
        close(found.logits, prediction)
    assert found.loss.item() == pytest.approx(error.mean().item(), rel=1e-3)
    back = load(out)
    again = back.model.eval()(CLIPS, visible, hidden)[0]
    assert (again - prediction).abs().max() < 1e-4
    assert back.config.target == trained.config.target


def test_exporting_a_file(clip_run, tmp_path):
    said = []
    hpm.export(clip_run.folder, "safetensors", tmp_path / "x.safetensors", said.append)
    clips = uint8_clips(2)
    pooled, patches = hpm.load_encoder(clip_run.folder)(clips)
    variables = {"clips": clips}
    exec(said[-1].partition("\n\n")[2], variables)
    close(variables["pooled"], pooled)
    close(variables["patches"], patches)


@pytest.mark.slow
def test_onnx(clip_run, tmp_path):
    """Batches of any size, of pixels, with the normalisation inside."""
    pytest.importorskip("onnxruntime")
    said = []
    hpm.export(clip_run.folder, "onnx", tmp_path / "x.onnx", said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    code = said[-1].partition("\n\n")[2]
    assert "[B, 3, 4, 16, 24]" in code
    for count in (1, 5):
        clips = uint8_clips(count)
        variables = {"pixels": (clips / 255).numpy()}
        exec(code, variables)
        pooled, patches = hpm.load_encoder(clip_run.folder)(clips)
        close(torch.from_numpy(variables["pooled"]), pooled)
        close(torch.from_numpy(variables["patches"]), patches)


def test_starting_from_an_exported_folder(clip_run, tmp_path):
    out = hpm.export(clip_run.folder, "hf", tmp_path / "hf", with_decoder=True)
    source = load(clip_run.folder)
    target = build_model(source.architecture, seed=7)
    said = initialise(target, out, partial=True)
    assert (
        "predictor none of" in said and "reconstructor 16 of 16" in said and "left over" not in said
    )
    projection = "encoder.patch_embed.proj.weight"
    assert torch.equal(target.state_dict()[projection], source.model.state_dict()[projection])
    visible, hidden = a_mask()[1:]
    close(target.eval()(CLIPS, visible, hidden)[0], source.model.eval()(CLIPS, visible, hidden)[0])


def test_the_frame_stride_is_kept(clip_run, tmp_path):
    """Clips of another stride would be of another length of time."""
    exported = hpm.export(clip_run.folder, "hf", tmp_path / "hf")
    written = hpm.export(clip_run.folder, "safetensors", tmp_path / "b.safetensors")
    for path in (clip_run.folder, clip_run.folder / "backbone.safetensors", exported, written):
        trained = load(path)
        assert trained.sampling().stride == 2 and trained.sampling(None, 1).stride == 1
        assert ASSUMED_STRIDE not in trained.notes
    config = json.loads((exported / "config.json").read_text())
    del config["frame_stride"]
    (exported / "config.json").write_text(json.dumps(config))
    assert load(exported).notes[-1] == ASSUMED_STRIDE
    (exported / "config.json").write_text(json.dumps(config | {"frame_stride": "2"}))
    with pytest.raises(UserError, match="frame_stride cannot be '2'"):
        load(exported)


def test_evaluating_an_exported_folder(clip_run, tmp_path):
    folder = hpm.export(clip_run.folder, "hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_frames"] == 4 and config["tubelet_size"] == 2
    rng = np.random.default_rng(0)
    for number in range(12):  # three videos of numbered frames for training, one for testing
        video = tmp_path / "videos" / f"class_{number % 3}" / f"{number}"
        video.mkdir(parents=True)
        for time in range(5):
            pixels = rng.integers(0, 99, (16, 24, 3)) + 50 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(video / f"{time}.png")
    options = {"workers": 0, "device": "cpu", "baselines": False, "out": str(tmp_path / "evals")}
    videos = str(tmp_path / "videos")
    results = [
        hpm.evaluate("knn", str(run), videos, k=(1,), frame_stride=1, **options).values
        for run in (folder, clip_run.folder)
    ]
    assert results[0] == results[1] and "trained, patch mean" in results[0]


@pytest.mark.parametrize(
    ("to", "changes", "words"),
    [
        ("hf", {"positions": "sincos"}, "train with --class-token false --positions sincos_1d"),
        ("hf", {"class_token": True}, "VideoMAE has no class token"),
        ("timm", {}, "timm takes images, but this encoder takes clips: pass --to hf"),
        ("torchvision", {}, "takes images, but this encoder takes clips"),
    ],
)
def test_what_cannot_be_exported(tmp_path, to, changes, words):
    path = backbone(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        hpm.export(path, to, tmp_path / ("x" if to == "hf" else "x.safetensors"))
    assert not list(tmp_path.glob("x*"))


def backbone(folder, **changes):
    from hpm.models.build import build_encoder
    from hpm.weights.resolve import save_backbone

    shape = {name: value for name, value in OURS.items() if "decoder" not in name}
    architecture = architecture_of(shape | changes)
    path = folder / "run.safetensors"
    weights = build_encoder(architecture, 0).state_dict()
    save_backbone(path, weights, architecture, [0.5] * 3, [0.25] * 3)
    return path


def test_trained_positions_cannot_be_exported(tmp_path):
    architecture = architecture_of(OURS).encoder()
    classifier = build_classifier(architecture, None, 2)
    assert not classifier.encoder.pos_embed.requires_grad
    state = {name: t.clone() for name, t in classifier.state_dict().items()}
    state["encoder.pos_embed"][0, 3] += 0.1
    about = {"kind": "hpm classifier", "architecture": architecture.to_json(), "pool": "mean"}
    about |= {"classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.25] * 3}
    write_tensors(tmp_path / "classifier.safetensors", state, about)
    with pytest.raises(UserError, match="positions are fixed, but those of this model were"):
        hpm.export(tmp_path / "classifier.safetensors", "hf", tmp_path / "hf")
    with pytest.raises(UserError, match="classifiers to onnx and safetensors"):
        hpm.export(tmp_path / "classifier.safetensors", "timm", tmp_path / "x.safetensors")


def test_a_file_without_its_config(tmp_path):
    theirs("VideoMAEModel", tmp_path)
    file = tmp_path / "alone" / "model.safetensors"
    file.parent.mkdir()
    save_file(load_file(tmp_path / "model.safetensors"), file)
    with pytest.raises(UserError, match=r'clips is unknown: add ."image_size": \[FRAMES, H, W\]'):
        load(file)
    for size, words in (
        ([4, 16, 24], "number of attention heads is unknown"),
        ([4, 16, 25], "does not divide"),
        ([4, 1600000, 2400000], "have 480000000000 patches"),
        ([16, 24], r"image_size cannot be \[16, 24\]"),
    ):
        file.with_suffix(".json").write_text(json.dumps({"image_size": size}))
        with pytest.raises(UserError, match=words):
            load(file)


def test_folders_that_hold_no_classifier(tmp_path):
    theirs("VideoMAEModel", tmp_path)
    with pytest.raises(UserError, match="no VideoMAEForVideoClassification"):
        hpm.load_model(tmp_path)
    result = run_here("predict", tmp_path, tmp_path, "--out", tmp_path / "x")
    assert_refused(result, "no VideoMAEForVideoClassification")
    config = {"architectures": ["VideoMAEForVideoClassification"], "id2label": {"0": "running"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="its tensors are named other"):
        hpm.load_model(tmp_path)

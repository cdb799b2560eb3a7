"""Other libraries' weights: recognised, converted with equal outputs, or refused with one line."""

import argparse
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import TINY, architecture_of, assert_refused, run_here
from published import SHAPE, published
from safetensors.torch import load_file, save_file
from test_golden import FILES, build

import hpm
from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder, build_model
from hpm.models.patches import patchify, resample_projection
from hpm.weights.contents import Contents
from hpm.weights.hugging_face import HuggingFaceViT
from hpm.weights.initialise import initialise
from hpm.weights.published import PublishedHpm, PublishedMae
from hpm.weights.resolve import load, recognise, resolve, save_backbone
from hpm.weights.shapes import derive_architecture
from hpm.weights.timm import Timm

timm = need("timm", "timm", "the test")
transformers = need("transformers", "hf", "the test")

# One head of 64 in the encoder, one of 32 in the decoders: what is assumed of bare files.
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
IDS = torch.arange(4).expand(2, -1), torch.arange(4, 16).expand(2, -1)


def model_of(shape, seed=0):
    return build_model(architecture_of(shape), seed)


def encoder_of(shape, seed=None):
    return build_encoder(architecture_of(shape), seed)


def close(a, b):
    assert a.shape == b.shape and (a - b).abs().max() < 1e-5


def same_model(trained, model, teacher=None):
    for found, expected in ((trained.model, model), (trained.teacher, teacher or model)):
        for a, b in zip(found.eval()(IMAGES, *IDS), expected.eval()(IMAGES, *IDS), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", ["state_dict", "model", ""])
def test_published_hpm(tmp_path, prefix, key):
    model, teacher = model_of(SHAPE, 1), model_of(SHAPE, 2)
    state = {prefix + name: tensor for name, tensor in published(model).items()}
    ema = {prefix + name: tensor for name, tensor in published(teacher).items()}
    content = {key: state, "ema_state_dict": ema, "epoch": 799} if key else state
    if key:  # as training scripts save them
        content |= {"args": argparse.Namespace(lr=1e-3), "optimizer": {"param_groups": [{}]}}
    torch.save(content, tmp_path / "hpm.pth")
    trained = load(tmp_path / "hpm.pth")
    same_model(trained, model, teacher if key else None)
    text = "; ".join(trained.notes)
    assert f"a published checkpoint of Hard Patches Mining; {len(state)} of its" in text
    assert "1 head (assumed)" in text and "ImageNet's mean and deviation (assumed)" in text
    assert ("the student is used in its place" in text) == (not key)
    assert trained.config.target == "normalized_pixels"


def test_a_file_of_the_teacher_alone(tmp_path):
    model = model_of(SHAPE, 1)
    torch.save({"ema_state_dict": published(model)}, tmp_path / "hpm.pth")
    same_model(load(tmp_path / "hpm.pth"), model)


def test_mae(tmp_path):
    model = model_of(SHAPE | {"with_predictor": False}, 1)
    torch.save({"model": published(model)}, tmp_path / "mae.pth")
    trained = load(tmp_path / "mae.pth")
    same_model(trained, model)
    assert trained.config.predictor_loss == "none" and trained.config.mask == "random"


TIMM = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "num_classes": 5,
}


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"qkv_bias": False}])
def test_timm(tmp_path, options):
    """Also where the norm comes behind the pooling, and without biases of queries and keys."""
    model = timm.create_model("vit_base_patch16_224", **TIMM, **options).eval()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    encoder = hpm.load_encoder(tmp_path / "x.safetensors")
    tokens = model.forward_features(IMAGES)
    tokens = model.fc_norm(tokens) if options.get("global_pool") else tokens
    close(encoder(IMAGES)[1], tokens[:, 1:])
    notes = load(tmp_path / "x.safetensors").notes
    assert "left over: head.bias, head.weight" in notes


HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_face(tmp_path, kind, suffix):
    config = transformers.ViTConfig(**HF)
    model = getattr(transformers, kind)(config).eval()
    save_pretrained(model, tmp_path, suffix)
    moments = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(moments))
    base = model if kind == "ViTModel" else model.vit
    tokens = base(IMAGES).last_hidden_state
    # The folder, and the file in it.
    for path in (tmp_path, next(p for p in tmp_path.iterdir() if p.suffix == f".{suffix}")):
        trained = load(path)
        close(trained.backbone().eval()(IMAGES)[1], tokens[:, 1:])
        assert trained.mean == [0.1, 0.2, 0.3] and trained.architecture.num_heads == 4
        assert not any("assumed" in note for note in trained.notes)


def save_pretrained(model, folder, suffix):
    model.save_pretrained(folder)
    if suffix == "bin":
        file = folder / "model.safetensors"
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()


@pytest.mark.parametrize("normalised", [True, False])
def test_vitmae(tmp_path, normalised):
    decoder = {f"decoder_{n}": HF[n] for n in ("hidden_size", "intermediate_size")}
    decoder |= {"decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    config = transformers.ViTMAEConfig(**HF, **decoder, norm_pix_loss=normalised)
    model = transformers.ViTMAEForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    trained = load(tmp_path)
    noise = torch.arange(16.0).expand(2, -1)  # shows the first patches
    theirs = model(IMAGES, noise=noise).logits[:, 4:]
    close(trained.model.eval()(IMAGES, *IDS)[0], theirs)
    assert trained.config.target == ("normalized_pixels" if normalised else "pixels")


def test_names_of_either_version_of_transformers():
    old = {
        "vit.embeddings.patch_embeddings.projection.weight": torch.zeros(4, 3, 2, 2),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.full((4, 4), 1.0),
        "vit.encoder.layer.0.attention.attention.key.weight": torch.full((4, 4), 2.0),
        "vit.encoder.layer.0.attention.attention.value.weight": torch.full((4, 4), 3.0),
        "vit.encoder.layer.0.attention.output.dense.weight": torch.zeros(4, 4),
        "vit.encoder.layer.0.intermediate.dense.bias": torch.zeros(16),
        "vit.encoder.layer.0.output.dense.bias": torch.zeros(4),
    }
    new = {
        "vit.embeddings.patch_embeddings.projection.weight": torch.zeros(4, 3, 2, 2),
        "vit.layers.0.attention.q_proj.weight": torch.full((4, 4), 1.0),
        "vit.layers.0.attention.k_proj.weight": torch.full((4, 4), 2.0),
        "vit.layers.0.attention.v_proj.weight": torch.full((4, 4), 3.0),
        "vit.layers.0.attention.o_proj.weight": torch.zeros(4, 4),
        "vit.layers.0.mlp.fc1.bias": torch.zeros(16),
        "vit.layers.0.mlp.fc2.bias": torch.zeros(4),
    }
    (a, _), (b, _) = HuggingFaceViT().to_ours(old), HuggingFaceViT().to_ours(new)
    assert a.keys() == b.keys()
    assert a["encoder.blocks.0.attn.qkv.weight"][:, 0].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert {f"encoder.blocks.0.{n}" for n in ("attn.proj.weight", "mlp.fc1.bias")} < a.keys()


def test_recognise():
    ours = model_of(SHAPE)
    names = published(ours)
    assert type(recognise(names)) is PublishedHpm
    assert type(recognise(n for n in names if "losspred" not in n)) is PublishedMae
    assert type(recognise(f"module.{n}" for n in names if "decoder" not in n)) is Timm
    assert recognise(["conv1.weight", "layer1.0.conv1.weight"]) is None
    assert recognise([]) is None


def test_golden_weights(tmp_path):
    """The published weights, started from a file, give the published numbers."""
    if not FILES:
        pytest.skip("the golden vectors (../shared/golden) are not here")
    tensors = load_file(FILES[0].with_suffix(".safetensors"))
    golden = argparse.Namespace(numbers=json.loads(FILES[0].read_text()), tensors=tensors)
    shape = golden.numbers["config"]
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if "weights." in n[:8]}
    torch.save({"state_dict": weights}, tmp_path / "hpm.pth")
    with pytest.raises(UserError, match=r"unknown \(width 48\): add .*num_heads.*hpm\.json"):
        load(tmp_path / "hpm.pth")
    about = {"num_heads": shape["num_heads"], "decoder_heads": shape["decoder_num_heads"]}
    (tmp_path / "hpm.json").write_text(json.dumps(about))
    fresh = model_of(
        SHAPE
        | {"image_size": [shape["img_size"]] * 2, "patch_size": [shape["patch_size"]] * 2}
        | {n: shape[n] for n in ("embed_dim", "depth", "num_heads", "decoder_depth")}
        | {"decoder_dim": shape["decoder_embed_dim"], "decoder_heads": shape["decoder_num_heads"]}
    )
    said = initialise(fresh, tmp_path / "hpm.pth", partial=False)
    assert f"init: {len(weights)} of {len(weights)} tensors matched" in said
    order = tensors["mask"].long().argsort(dim=1, stable=True)
    hidden = int(tensors["mask"][0].sum())
    for model in (load(tmp_path / "hpm.pth").model, fresh, build(golden)):
        prediction, predicted = model(tensors["images"], order[:, :-hidden], order[:, -hidden:])
        for ours, name in ((prediction, "prediction"), (predicted, "predicted_loss")):
            expected = tensors[f"{name}_hidden"]
            assert (ours - expected).norm() / expected.norm() < 2e-5


def test_starting_from_another_image_and_patch_size(tmp_path):
    source = encoder_of(SHAPE, 1)
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    target = model_of(SHAPE | {"image_size": [32, 64], "patch_size": [8, 8]}, 2)
    before = target.mask_token.clone()
    with pytest.raises(UserError, match="pass --init-partial"):
        initialise(target, tmp_path / "vit.pth", partial=False)
    said = initialise(target, tmp_path / "vit.pth", partial=True)
    for words in (
        "encoder 30 of 30",
        "reconstructor none of 16",
        "predictor none of 16",
        "encoder.pos_embed resampled from 4 x 4 to 4 x 8 patches",
        "patch projection resampled from 4 x 4 to 8 x 8 pixels",
    ):
        assert words in said, said
    assert torch.equal(target.encoder.norm.weight, source.norm.weight)
    assert torch.equal(target.mask_token, before)
    # Enlarged images of the old size give the tokens that they gave.
    enlarged = torch.nn.functional.interpolate(
        patches := torch.randn(5, 3, 4, 4), (8, 8), mode="bicubic", antialias=True
    )
    embed = target.encoder.patch_embed
    close(embed(patchify(enlarged, (8, 8))), source.patch_embed(patchify(patches, (4, 4))))


def test_starting_from_a_teacher(tmp_path):
    model, teacher = model_of(SHAPE, 1), model_of(SHAPE, 2)
    torch.save(
        {"state_dict": published(model), "ema_state_dict": published(teacher)}, tmp_path / "x.pth"
    )
    fresh = model_of(SHAPE, 3)
    initialise(fresh, tmp_path / "x.pth", partial=False, teacher=True)
    assert torch.equal(fresh.encoder.cls_token, teacher.encoder.cls_token)
    torch.save({"state_dict": published(model)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds no teacher: leave --init-teacher out"):
        initialise(fresh, tmp_path / "x.pth", partial=False, teacher=True)


def test_resampled_projections():
    weight = torch.randn(6, 3, 4, 4)
    assert torch.equal(resample_projection(weight, (4, 4)), weight)
    assert resample_projection(weight, (2, 8)).shape == (6, 3, 2, 8)
    # Plain patches stay plain, and so give the same tokens.
    close(resample_projection(weight, (8, 12)).sum((2, 3)), weight.sum((2, 3)))


def test_positions_that_were_learned_stay(tmp_path):
    source = encoder_of(SHAPE, 1)
    torch.nn.init.normal_(source.pos_embed)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    encoder = load(tmp_path / "vit.safetensors").encoder
    assert torch.equal(encoder.pos_embed, source.pos_embed)
    assert not encoder.pos_embed.requires_grad


def test_another_number_of_heads_is_refused(tmp_path):
    config = transformers.ViTConfig(**HF | {"hidden_size": 64})
    transformers.ViTModel(config).save_pretrained(tmp_path)
    model = model_of(SHAPE)
    with pytest.raises(UserError, match="has 4 attention heads, but the model 1"):
        initialise(model, tmp_path, partial=True)


def test_weights_under_the_model_s_own_names_still_start_it(tmp_path):
    source = model_of(SHAPE, 1)
    torch.save({"model": state_of(source)}, tmp_path / "own.pth")
    said = initialise(model_of(SHAPE, 2), tmp_path / "own.pth", partial=False)
    assert "66 of 66 tensors matched" in said
    hiera = {"model": "timm/hiera_tiny_224", "image_size": [64, 64], "patch_size": [32, 32]}
    target = model_of(SHAPE | hiera, 2)
    save_file(state_of(target.encoder), tmp_path / "hiera.safetensors")
    said = initialise(target, tmp_path / "hiera.safetensors", partial=True)
    count = len(target.encoder.state_dict())
    assert f"encoder {count} of {count}" in said
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no weights of such a model"):
        initialise(target, tmp_path / "x.pth", partial=True)


def test_a_huge_vit_has_sixteen_heads(tmp_path):
    state = {f"encoder.blocks.{number}.x": torch.empty(1) for number in range(32)}
    state["encoder.patch_embed.proj.weight"] = torch.empty(1280, 3, 14, 14)
    state["encoder.pos_embed"] = torch.empty(1, 257, 1280)
    contents = Contents("x", tmp_path, state, format=Timm())
    assert derive_architecture(contents).num_heads == 16


# What is wrong with a file, and what is said.


class Evil:
    def __reduce__(self):
        return (Path.mkdir, (Path("trap"),))


def state_of(model_or_encoder):
    return dict(model_or_encoder.state_dict())


def bomb(path):
    """A megabyte of zeros for each kilobyte."""
    torch.save({"model": {"x": torch.zeros(10)}}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(10**7))


def spread(path):
    """One number that claims to be a terabyte."""
    torch.save({"x": torch.zeros(1).expand(10**6, 250_000)}, path)


def many_blocks(path):
    state = state_of(encoder_of(SHAPE))
    state |= {f"blocks.{n}.x": torch.zeros(1) for n in range(10, 60)}
    torch.save({"model": state}, path)


def one_changed(name, change):
    def write(path):
        state = state_of(encoder_of(SHAPE))
        state[name] = change(state[name])
        torch.save({"model": state}, path)

    return write


def one_more(name):
    def write(path):
        torch.save({"model": state_of(encoder_of(SHAPE)) | {name: torch.ones(64)}}, path)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "truncated or not a weights file"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "truncated or not a weights"),
        (lambda path: torch.save({"model": Evil()}, path), "contains pickled code"),
        (lambda path: torch.save({"epoch": 3}, path), "no tensors in it"),
        (lambda path: torch.save(torch.zeros(3), path), "no tensors in it"),
        (bomb, "would unpack to 0.01"),
        (spread, "x is not a plain tensor"),
        (many_blocks, "of another architecture|conv"),
        (one_more("reg_token"), "it has reg_token, which a plain"),
        (one_more("blocks.0.ls1.gamma"), r"blocks\.0\.ls1\.gamma is not known"),
        (one_changed("blocks.1.mlp.fc1.weight", lambda t: t[:5]), r"\(5, 64\) instead of"),
        (one_changed("patch_embed.proj.weight", lambda t: t.flatten(1)), "or of another shape"),
        (one_changed("pos_embed", lambda t: t[:, :-1]), "16 positions are not a class token"),
        (one_changed("pos_embed", lambda t: t[..., :6]), "pos_embed is"),
        (lambda path: torch.save({"conv.weight": torch.ones(3)}, path), "named conv.weight"),
    ],
)
def test_what_is_refused(tmp_path, write, words):
    path = tmp_path / "weights.pth"
    write(path)
    for read in (load, lambda path: initialise(model_of(SHAPE), path, True)):
        if read is not load and re.search(
            "blocks|instead|positions|pos_embed|shape|another architecture|conv", words
        ):
            continue  # there a part may fit: see below
        with pytest.raises(UserError, match=words) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not Path("trap").exists()


@pytest.mark.parametrize("size", [10, 1000, -10])
def test_a_truncated_file(tmp_path, size):
    torch.save({"model": published(model_of(SHAPE))}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[:size])
    with pytest.raises(UserError, match="truncated or not a weights file|pickled code"):
        load(tmp_path / "x.pth")


def test_a_safetensors_header_that_promises_too_much(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    with pytest.raises(UserError, match="truncated or not a weights file"):
        load(path)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"num_heads": 7}, r"unknown \(width 64\): add .*num_heads"),
        ({"num_heads": "many"}, "num_heads cannot be 'many'"),
        ({"image_size": [10**9, 10**9]}, "does not match its 17 positions"),
        ({"image_size": [-16, -16]}, "does not match"),
        ({"image_size": "big"}, "image_size cannot be 'big'"),
        ({"hidden_act": "silu"}, "its activation is silu; only gelu"),
        ({"mean": [0.5], "std": [1]}, "do not fit 3 channels"),
        ({"mean": [0, 0, 0], "std": [0, 1, 1]}, "do not fit 3 channels"),
    ],
)
def test_a_json_that_does_not_fit(tmp_path, about, words):
    torch.save(state_of(encoder_of(SHAPE)), tmp_path / "x.pth")
    (tmp_path / "x.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "x.pth")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        load(tmp_path / "x.pth")


def test_seven_channels_want_their_normalisation(tmp_path):
    torch.save(state_of(encoder_of(SHAPE | {"channels": 7})), tmp_path / "x.pth")
    with pytest.raises(
        UserError, match='the normalisation of its 7 channels is unknown: add ."mean"'
    ):
        load(tmp_path / "x.pth")
    (tmp_path / "x.json").write_text(json.dumps({"mean": [0.5] * 7, "std": [0.2] * 7}))
    assert load(tmp_path / "x.pth").mean == [0.5] * 7


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint and no backbone"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="no model.safetensors and no pytorch_model.bin"):
        load(tmp_path)


# From the command line and from Python, as a user goes.


@pytest.fixture(scope="module")
def hpm_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "hpm.pth"
    torch.save({"state_dict": published(model_of(SHAPE, 1))}, path)
    return path


def test_eval_show_and_export_take_a_published_file(hpm_file, image_folder, tmp_path):
    said = []
    options = {"workers": 0, "device": "cpu", "baselines": False, "out": str(tmp_path)}
    result = hpm.evaluate("knn", str(hpm_file), str(image_folder), said.append, k=(3,), **options)
    assert "a published checkpoint of Hard Patches Mining" in said[0] and result.hardness
    shown = run_here("show", hpm_file, image_folder, "--images", "2", "--out", tmp_path / "x.png")
    assert shown.returncode == 0 and "normalised pixels (assumed)" in shown.stdout, shown.stderr
    hpm.export(hpm_file, "hf", tmp_path / "hf", said.append, with_decoder=True)
    text = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "Not trained by hpm: converted from hpm.pth, a published" in text
        and "hard-patches-mining" not in text
    )
    back = load(tmp_path / "hf")
    close(back.backbone().eval()(IMAGES)[1], load(hpm_file).backbone().eval()(IMAGES)[1])


def test_a_backbone_alone_cannot_reconstruct(image_folder, tmp_path):
    save_file(state_of(encoder_of(SHAPE)), tmp_path / "vit.safetensors")
    result = run_here(
        "show",
        tmp_path / "vit.safetensors",
        image_folder,
        "--panels",
        "image,reconstruction",
        "--out",
        tmp_path / "figure.png",
    )
    assert_refused(result, "has a backbone only")
    options = {"workers": 0, "device": "cpu"}
    with pytest.raises(UserError, match="backbone only"):
        hpm.evaluate(
            "hardness", str(tmp_path / "vit.safetensors"), str(image_folder), print, **options
        )


def test_pretraining_from_a_published_file(hpm_file, image_folder, tmp_path):
    """By the heads that our smallest model has, in another patch size."""
    shape = SHAPE | {"embed_dim": 96, "depth": 4, "num_heads": 3, "image_size": [32, 32]}
    torch.save({"state_dict": published(model_of(shape, 1))}, tmp_path / "nano.pth")
    options = TINY | {"steps": 1, "decoder_heads": 1, "init": str(tmp_path / "nano.pth")}
    run = hpm.pretrain(data=str(image_folder), out=str(tmp_path / "run"), **options)
    log = (run.folder / "train.log").read_text()
    assert "encoder 54 of 54" in log and "resampled from 8 x 8 to 4 x 4 patches" in log


def test_our_own_backbone_at_another_size(tmp_path):
    source = encoder_of(SHAPE, 1)
    save_backbone(
        tmp_path / "x.safetensors",
        source.state_dict(),
        architecture_of(SHAPE),
        [0.5] * 3,
        [0.5] * 3,
    )
    target = model_of(SHAPE | {"image_size": [24, 24]}, 2)
    said = initialise(target, tmp_path / "x.safetensors", partial=True)
    assert "encoder 30 of 30" in said and "from 4 x 4 to 6 x 6 patches" in said


SMALL = "timm/test_vit.r160_in1k"


@pytest.fixture
def timms_weights(monkeypatch):
    """Random weights in the place of timm's, which are on the network."""
    encoder = build_encoder(
        Architecture(
            model=SMALL,
            image_size=(160, 160),
            patch_size=(16, 16),
            channels=3,
            embed_dim=64,
            depth=8,
        ),
        seed=7,
    )
    monkeypatch.setattr("hpm.weights.timm.pretrained_weights", lambda wanted: encoder.state_dict())
    return encoder.eval()


def test_timms_own_weights(timms_weights):
    encoder = hpm.load_encoder(SMALL)
    images = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    normalised = (images / 255 - 0.5) / 0.5  # as this model's weights want it
    with torch.no_grad():
        expected = timms_weights(normalised)[:, timms_weights.num_prefix_tokens :]
        torch.testing.assert_close(encoder(images)[1], expected)


def test_timms_own_weights_wherever_a_run_is_named(
    timms_weights, finished_run, image_folder, tmp_path
):
    options = {"workers": 0, "k": (1,), "baselines": False}
    run, data = str(finished_run.folder), str(image_folder)
    said = []
    alone = hpm.evaluate("knn", SMALL, data, said.append, out=str(tmp_path / "evals"), **options)
    assert "normalised by mean [0.5, 0.5, 0.5]" in said[0] and alone.file.exists()
    both = hpm.evaluate("knn", run, data, said.append, compare=SMALL, **options)
    name = "patch mean"
    assert both.values[f"compared, {name}"] == alone.values[f"trained, {name}"]
    both.file.unlink()
    out = hpm.export(SMALL, "timm", tmp_path / "x.safetensors", said.append)
    assert load_file(out).keys() == timms_weights.state_dict().keys()
    result = run_here(
        "show", SMALL, data, "--out", tmp_path / "x.png", "--images", 2, "--device", "cpu"
    )
    assert result.returncode == 0 and (tmp_path / "x.png").exists(), result.stderr


def test_timms_own_weights_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(hpm.UserError, match=f"{SMALL} is not on disk .* cannot be reached") as no:
        hpm.load_encoder(SMALL)
    assert "\n" not in str(no.value)
    with pytest.raises(hpm.UserError, match="'timm/vit_tiny_patch16_22', .* did you mean"):
        hpm.load_encoder("timm/vit_tiny_patch16_22")
    with pytest.raises(hpm.UserError, match="timm has no weights for timm/vit_base_patch16_xp"):
        hpm.load_encoder("timm/vit_base_patch16_xp_224")
    with pytest.raises(hpm.UserError, match="cannot run on a subset of its patches"):
        hpm.load_encoder("timm/resnet18")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": "timm"}, ([0.5] * 3, [0.5] * 3)),
        ({"normalize": "imagenet"}, (IMAGENET_MEAN, IMAGENET_STD)),
        ({"pretrained": True}, ([0.5] * 3, [0.5] * 3)),
        ({"pretrained": True, "channels": 1}, None),
        ({}, None),
    ],
)
def test_images_are_normalised_as_timms_weights_want_it(
    image_folder, tmp_path, monkeypatch, options, expected
):
    monkeypatch.setattr(
        "hpm.training.build.pretrained_weights", lambda encoder: encoder.state_dict()
    )
    sizes = {"image_size": 32, "patch_size": 16, "steps": 1, "model": SMALL}
    run = hpm.pretrain(
        data=str(image_folder), out=str(tmp_path / "run"), **(TINY | sizes | options)
    )
    trained = load(run.folder)
    if expected:
        assert (trained.mean, trained.std) == expected
        assert trained.config.normalize == options.get("normalize", "timm")
    else:
        assert trained.config.normalize == "measured" and trained.mean[0] not in (0.5, 0.485)


def test_bad_normalisation():
    def refused(words, **options):
        with pytest.raises(hpm.UserError, match=words):
            hpm.pretrain(data="demo", out="never", normalize="timm", **options)

    refused("needs a model of timm, but model is vit_tiny", model="vit_tiny")
    refused("has 3 channels, but channels is 1", model=SMALL, channels=1)


# What `resolve` alone says.


def test_one_answer_for_ours_and_others(finished_run, hpm_file):
    """The same fields, whatever it was read from."""
    run = resolve(finished_run.folder)
    file = resolve(finished_run.latest_checkpoint())
    assert (run.folder, run.path, file.folder) == (finished_run.folder, file.path, None)
    assert run.architecture == file.architecture and run.step == 8
    assert run.config.mask == "easy_to_hard"
    assert run.student.keys() == run.teacher.keys() == load(run.path).model.state_dict().keys()
    backbone = resolve(finished_run.backbone)
    assert backbone.architecture == run.architecture.encoder() and backbone.teacher is None
    assert all(torch.equal(t, run.student[name]) for name, t in backbone.student.items())
    published_file = resolve(hpm_file)
    assert published_file.recognised and published_file.architecture is None
    assert {"encoder.cls_token", "predictor.head.bias"} <= published_file.student.keys()
    assert "blocks.0.attn.qkv.weight" in resolve(hpm_file, convert=False).student


def test_a_run_starts_from_a_run_folder(finished_run):
    """As it loads from one: by its latest checkpoint."""
    trained = load(finished_run.folder)
    model = build_model(trained.architecture, seed=9)
    said = initialise(model, finished_run.folder, partial=False)
    assert str(finished_run.latest_checkpoint()) in said
    assert torch.equal(model.mask_token, trained.model.mask_token)
    initialise(model, finished_run.folder, partial=False, teacher=True)
    assert torch.equal(model.mask_token, trained.teacher.mask_token)

"""Pixio's lessons: several class tokens, masks of units, a deep decoder."""

import dataclasses

import pytest
import torch
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.core.config import PretrainConfig
from hpm.models.architecture import SIZES, Architecture, resolve_model
from hpm.models.build import build_classifier, build_encoder, build_model
from hpm.weights.checkpoint import load_checkpoint
from hpm.weights.initialise import initialise
from hpm.weights.resolve import load

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
PIXIO = {"class_tokens": 4, "decoder": "deep", "decoder_depth": None, "mask_unit": 2}


def tiny_architecture(**options):
    return resolve_model(PretrainConfig("x", "y", model="vit_nano", **options))


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pixio") / "run"
    return hpm.pretrain(str(image_folder), str(out), **TINY | PIXIO)


def test_the_architecture_in_files():
    several = tiny_architecture(class_tokens=4)
    assert several.to_json()["class_tokens"] == 4
    assert Architecture.from_json(several.to_json()) == several
    assert "class_tokens" not in tiny_architecture().to_json()  # as older files
    assert dataclasses.replace(several, class_tokens=1) == tiny_architecture()


def test_their_mean_is_the_feature(run):
    """Of the backbone and of a classifier that pools them."""
    backbone = hpm.load_encoder(run.folder, pool="cls")
    encoder = backbone.encoder
    with torch.no_grad():
        tokens = encoder(IMAGES)
        pooled, patches = backbone(IMAGES)
        features, attention = encoder.with_attention(IMAGES)
    assert tokens.shape == (2, 4 + 16, 96) and patches.shape == (2, 16, 96)
    assert torch.equal(pooled, tokens[:, :4].mean(1)) and torch.equal(patches, tokens[:, 4:])
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])
    assert torch.allclose(features, tokens, atol=1e-6)
    assert attention.shape == (2, 3, 16) and (attention.sum(-1) > 0).all()
    assert (attention.sum(-1) < 1).all()  # the rest is on the class tokens
    classifier = build_classifier(load(run.folder).architecture, encoder.state_dict(), 3, "cls")
    with torch.no_grad():
        torch.testing.assert_close(classifier.pooled(IMAGES), pooled)


def test_attention_is_the_mean_over_class_tokens():
    encoder = build_encoder(tiny_architecture(class_tokens=3, image_size=16, patch_size=4), 0)
    block = encoder.blocks[-1]
    x = torch.randn(1, 3 + 16, 96)
    found = block.attention_of_first_tokens(x, 3)
    each = [
        block.attention_of_first_tokens(torch.cat([x[:, [n]], x[:, :n], x[:, n + 1 :]], 1), 1)
        for n in range(3)
    ]
    expected = torch.stack([one[..., 3:] for one in each]).mean(0)
    torch.testing.assert_close(found[..., 3:], expected)


def test_a_run_goes_through_and_masks_units(run):
    model = load_checkpoint(run.latest_checkpoint()).model
    assert model["encoder.cls_token"].shape == (1, 4, 96)
    assert len({name.split(".")[2] for name in model if name.startswith("reconstructor.b")}) == 8
    assert len({name.split(".")[2] for name in model if name.startswith("predictor.b")}) == 2
    assert load(run.folder).config.mask_unit == 2
    encoder = hpm.load_encoder(run.folder, image_size=(24, 16))  # other positions
    assert encoder(torch.zeros(1, 3, 24, 16))[1].shape == (1, 24, 96)


@pytest.mark.parametrize("model", SIZES)
def test_a_deep_decoder(model):
    """Four times the blocks of the reconstructor; 32 of width 512 for ViT-H, as Pixio's."""
    standard, deep = (
        resolve_model(PretrainConfig("x", "y", model=model, decoder=each)).decoders
        for each in ("standard", "deep")
    )
    assert deep == dataclasses.replace(standard, decoder_depth=4 * standard.decoder_depth)
    if model == "vit_huge":
        assert (deep.decoder_dim, deep.decoder_depth, deep.decoder_heads) == (512, 32, 16)
    # As config.yaml has it.
    resolved = PretrainConfig(
        "x", "y", model=model, decoder="deep", decoder_depth=deep.decoder_depth
    )
    assert resolve_model(resolved).decoders == deep


def test_from_one_class_token_to_several(finished_run):
    """The first is that of the weights; positions and patches are theirs, too."""
    architecture = dataclasses.replace(load(finished_run.folder).architecture, class_tokens=4)
    model = build_model(architecture, seed=1)
    new = model.encoder.cls_token.detach().clone()
    line = initialise(model, finished_run.folder, partial=False)
    assert "3 class tokens new" in line
    encoder = load(finished_run.folder).encoder
    assert torch.equal(model.encoder.cls_token[:, :1], encoder.cls_token)
    assert torch.equal(model.encoder.cls_token[:, 1:], new[:, 1:])
    assert torch.equal(model.encoder.pos_embed[:, 4:], encoder.pos_embed[:, 1:])
    assert not model.encoder.pos_embed[:, :4].any()


def test_weights_of_several_at_another_size(run):
    architecture = load(run.folder).architecture
    model = build_model(dataclasses.replace(architecture, image_size=(24, 24)))
    assert "resampled from 4 x 4 to 6 x 6 patches" in initialise(model, run.folder, partial=False)


def test_exported_to_timm_as_registers(run, tmp_path):
    said = []
    hpm.export(run.folder, "timm", tmp_path / "x.safetensors", said.append)
    assert "reg_tokens=3" in said[-1] and "[:, 4:]" in said[-1]
    names = {"images": IMAGES}
    with torch.no_grad():
        exec(said[-1].partition("\n\n")[2], names)
        pooled, patches = hpm.load_encoder(run.folder)(IMAGES)
    torch.testing.assert_close(names["pooled"], pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(names["patches"], patches, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hf"], "transformers' ViT has one class token, and this encoder has 4: pass --to timm"),
        (["hf", "--with-decoder"], "has one class token, and this encoder has 4"),
        (["torchvision"], "torchvision's VisionTransformer has one class token"),
        (["timm", "--pool", "cls"], "timm pools one class token, and this encoder has 4"),
    ],
)
def test_exports_that_need_one_class_token(arguments, words, run, tmp_path):
    out = tmp_path / ("x" if "hf" in arguments else "x.safetensors")
    assert_refused(run_here("export", run.folder, "--out", out, "--to", *arguments), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_tokens": 0}, "--class-tokens is 0; it must be at least 1"),
        ({"class_tokens": 2, "class_token": "false"}, "but class_token is false: leave one"),
        (
            {"class_tokens": 2, "model": "timm/vit_tiny_patch16_224"},
            "class_tokens is 2, but model is timm/",
        ),
        ({"decoder": "deep", "decoder_depth": 3}, "decoder is deep, but decoder_depth is 3: leave"),
        (
            {"decoder": "deeper"},
            "--decoder is 'deeper'; did you mean 'deep'? (one of standard, deep)",
        ),
    ],
)
def test_mistakes(options, words, image_folder, tmp_path):
    arguments = tiny_arguments(**options)
    result = run_here("pretrain", image_folder, "--out", tmp_path / "run", *arguments)
    assert_refused(result, words)

"""The architecture: what a config makes of it, and what files hold."""

import json
from dataclasses import replace

import pytest

import hpm
from hpm.core.config import PretrainConfig
from hpm.models.architecture import Architecture, Decoders, resolve_model
from hpm.models.build import build_model

# As a checkpoint of 0.1 holds them.
OURS = {
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "image_size": [32, 64],
    "patch_size": [8, 8],
    "channels": 3,
    "decoder_dim": 64,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "with_predictor": True,
    "predictor_dim": 32,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "predictor_head": "scalar",
    "detach_predictor": True,
    "with_cover": False,
    "target_dim": 192,
}
TIMMS = {
    "model": "timm/vit_tiny_patch16_224",
    "embed_dim": 192,
    "depth": 12,
    "num_heads": 3,
    "patch_size": [16, 16],
    "class_token": True,
    "image_size": [32, 32],
    "channels": 4,
    "decoder_dim": 128,
    "decoder_depth": 4,
    "decoder_heads": 4,
    "with_predictor": True,
    "predictor_dim": 128,
    "predictor_depth": 4,
    "predictor_heads": 4,
    "predictor_head": "patch",
    "detach_predictor": False,
    "with_cover": True,
}
HIERA = {
    "model": "timm/hiera_tiny_224",
    "embed_dim": 768,
    "depth": 12,
    "patch_size": [32, 32],
    "class_token": False,
    "image_size": [64, 64],
    "channels": 3,
}


@pytest.mark.parametrize("content", [OURS, TIMMS, HIERA])
def test_files_are_read_and_written_as_before(content):
    architecture = Architecture.from_json(json.loads(json.dumps(content)))
    assert architecture.to_json() == content
    assert Architecture.from_json(architecture.to_json()) == architecture


def test_what_a_config_makes_is_what_its_checkpoint_holds():
    config = PretrainConfig(
        "data",
        "out",
        model="vit_nano",
        image_size=(32, 64),
        patch_size=8,
        predictor_dim=32,
        predictor_head="scalar",
        predictor_detach=True,
    )
    assert resolve_model(config).with_target_dim(192).to_json() == OURS
    timm = PretrainConfig(
        "data", "out", model="timm/vit_tiny_patch16_224", image_size=32, channels=4, mask="uniform"
    )
    assert resolve_model(timm).to_json() == TIMMS
    hiera = PretrainConfig("data", "out", model="timm/hiera_tiny_224", image_size=64)
    assert resolve_model(hiera).encoder().to_json() == HIERA


def test_files_of_the_first_version():
    """They lack what has been added since."""
    first = {name: OURS[name] for name in list(OURS)[:10]}
    decoders = Architecture.from_json(first).decoders
    assert decoders == Decoders(64, 2, 2, True, 64, 2, 2, "patch", False, False, None)
    older_timm = {name: value for name, value in TIMMS.items() if name != "class_token"}
    assert Architecture.from_json(older_timm).class_token


def test_the_encoder_of_a_backbone_file():
    about = Architecture.from_json(OURS).encoder().to_json()
    assert list(about) == [
        "image_size",
        "patch_size",
        "channels",
        "embed_dim",
        "depth",
        "num_heads",
    ]
    described = about | {"mean": [0.5], "std": [0.5], "kind": "hpm encoder", "hpm": "0.1"}
    assert Architecture.from_json(described).to_json() == about
    with pytest.raises(ValueError, match="encoder alone"):
        build_model(Architecture.from_json(about))


def test_it_cannot_be_changed_in_place():
    architecture = Architecture.from_json(OURS)
    with pytest.raises(AttributeError):
        architecture.channels = 4
    larger = replace(architecture, image_size=(64, 64))
    assert larger.image_size == (64, 64) and architecture.image_size == (32, 64)
    assert larger.decoders is architecture.decoders


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": None}, "depth is None"),
        ({"depth": -1}, "depth is -1"),
        ({"embed_dim": "wide"}, "embed_dim is 'wide'"),
        ({"channels": True}, "channels is True"),
        ({"image_size": 32}, "image_size is 32, not pixels along each axis"),
        ({"patch_size": [8, 0]}, r"patch_size is \[8, 0\]"),
        ({"predictor_head": "many"}, "predictor_head is 'many'"),
        ({"predictor_heads": 0}, "predictor_heads is 0"),
    ],
)
def test_values_that_cannot_be_right(change, words):
    with pytest.raises(hpm.UserError, match=f"^x.pth: .*{words}"):
        Architecture.from_json(OURS | change, "x.pth")


@pytest.mark.parametrize("name", ["num_heads", "image_size", "with_predictor", "decoder_heads"])
def test_what_is_missing_is_named(name):
    content = {key: value for key, value in OURS.items() if key != name}
    with pytest.raises(hpm.UserError, match=f"lacks {name}"):
        Architecture.from_json(content)

"""Weights drawn layer by layer are those of a model that is built whole."""

import pytest
import torch
from helpers import architecture_of

from hpm.core.extras import need
from hpm.models.build import build_empty_model, build_model
from hpm.models.initial import draw_weights

IMAGES = {
    "image_size": [8, 8],
    "patch_size": [4, 4],
    "channels": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_dim": 12,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "with_predictor": True,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False},
        {"class_tokens": 4},
        {"with_predictor": False, "with_cover": True},
        {"predictor_dim": 8, "predictor_head": "scalar"},
        {"positions": "sincos_1d", "image_size": [4, 8, 8], "patch_size": [2, 4, 4]},
    ],
)
def test_the_weights_of_a_model_that_is_built_whole(changes):
    architecture = architecture_of(IMAGES | changes)
    whole = build_model(architecture, seed=3).state_dict()
    empty = build_empty_model(architecture, seed=3)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    before, drawn = torch.get_rng_state(), {}
    draw_weights(empty, 3, lambda name, value: drawn.update({name: value.clone()}))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(drawn[name], tensor), name


def test_no_more_than_a_layer_exists_at_a_time():
    """A model of a billion parameters is described without memory, and drawn in parts."""
    shape = {"embed_dim": 1664, "depth": 31, "num_heads": 16, "decoder_dim": 512}
    architecture = architecture_of(
        IMAGES | shape | {"image_size": [224, 224], "patch_size": [14, 14]}
    )
    empty = build_empty_model(architecture)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    assert parameters > 1e9 and all(parameter.is_meta for parameter in empty.parameters())
    # Of all its layers, as many as it takes to see that each has a copy of its own.
    empty.encoder.blocks = empty.encoder.blocks[:1]
    largest = 0

    def put(name, value):
        nonlocal largest
        assert value.untyped_storage().nbytes() == value.nbytes
        largest = max(largest, value.numel())

    draw_weights(empty, 0, put)
    assert largest == 1664 * 4 * 1664


def test_encoders_of_timm_are_built_whole():
    need("timm", "timm", "this test")
    changes = {"model": "timm/vit_tiny_patch16_224", "image_size": [32, 32], "patch_size": [16, 16]}
    architecture = architecture_of(
        IMAGES | changes | {"embed_dim": 192, "depth": 12, "num_heads": 3}
    )
    whole = build_model(architecture, seed=3).state_dict()
    empty = build_empty_model(architecture, seed=3)
    drawn = {n: t for n, t in empty.state_dict().items() if not t.is_meta}
    assert drawn and all(name.startswith("encoder.") for name in drawn)
    draw_weights(empty, 3, lambda name, value: drawn.update({name: value.clone()}))
    assert drawn.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(drawn[name], tensor), name


def test_the_generators_of_gpus_stay_as_they_are(monkeypatch):
    """A program that trains on one may load an encoder meanwhile."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    build_model(architecture_of(IMAGES), seed=3)
    assert seeded == [] and torch.equal(torch.get_rng_state(), before)

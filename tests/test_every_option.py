"""Every mask, target and predictor trains: on the built-in images the loss falls in 200 steps."""

import math
from typing import get_args

import pytest
import torch

import hpm
from hpm.commands.options import TokenizeConfig
from hpm.commands.tokenize import tokenize
from hpm.core.choices import TargetName
from hpm.core.extras import need
from hpm.mining.draw import Draw
from hpm.mining.masking import make_mask, num_hidden_patches
from hpm.mining.strategies import BUILT_IN
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import patchify, unpatchify
from hpm.models.vit import VisionTransformer

SMALL = {
    "data": "demo",
    "model": "vit_nano",
    "image_size": 32,
    "patch_size": 8,
    "batch_size": 16,
    "steps": 200,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "base_lr": 3e-2,
    "workers": 0,
    "holdout": 0,
    "log_every": 10,
    "checkpoint_every": "100%",
    "hard_share_start": 0.25,
    "device": "cpu",
}


def losses(out, **options):
    run = hpm.pretrain(out=str(out), **SMALL | options)
    return [line["reconstruction_loss"] for line in run.metrics() if "reconstruction_loss" in line]


def assert_falls(found):
    """The mean of the last fifth against the first reading."""
    assert all(math.isfinite(loss) for loss in found)
    last = found[-len(found) // 5 :]
    assert sum(last) / len(last) < 0.97 * found[0], found


@pytest.mark.slow
@pytest.mark.parametrize("mask", BUILT_IN)
def test_every_mask_trains(mask, tmp_path):
    assert_falls(losses(tmp_path / "run", mask=mask, target="pixels"))


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in get_args(TargetName) if t not in ("frozen",)])
def test_every_target_trains(target, tmp_path):
    options = {}
    if target == "tokens":
        options["codebook"] = str(tmp_path / "codebook.safetensors")
        tokenize(
            TokenizeConfig(
                "demo", options["codebook"], codes=16, image_size=32, patch_size=8, images=100
            )
        )
    if target == "teacher":
        # The teacher starts as the student: only later is there something to catch up with.
        found = losses(tmp_path / "run", target=target, mask="random")
        assert all(math.isfinite(loss) for loss in found) and found[-1] < 2
        return
    assert_falls(losses(tmp_path / "run", target=target, mask="random", **options))


@pytest.mark.slow
def test_features_of_a_frozen_model_are_learned(tmp_path):
    transformers = need("transformers", "hf", "x")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{}")
    model = str(tmp_path / "vit")
    assert_falls(losses(tmp_path / "run", target="frozen", target_model=model, mask="random"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"predictor_loss": "absolute"},
        {"predictor_detach": True},
        {"predictor_dim": 16, "predictor_depth": 2, "predictor_heads": 1},
        {"predictor_head": "scalar"},
        {"teacher_view": "masked"},
        {"ranking_signal": "normalized_pixels"},
        {"hard_share_schedule": "cosine"},
    ],
    ids=lambda options: "_".join(options),
)
def test_every_predictor_trains(options, tmp_path):
    assert_falls(losses(tmp_path / "run", target="pixels", **options))


@pytest.mark.parametrize("mask", BUILT_IN)
def test_what_is_hidden_stays_hidden(mask):
    """Other pixels in hidden (and covered) patches: the same prediction, bit by bit."""
    torch.manual_seed(0)
    encoder = VisionTransformer((32, 32), (4, 4), 3, 32, 1, 2)
    model = MaskedImageModel(encoder, 32, 1, 2, with_cover=True).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.arange(2)
    visible_ids, hidden_ids = make_mask(
        mask, Draw(0, 0, ids), encoder.grid, num_hidden_patches(64, 0.75), torch.randn(2, 64), 24
    )
    covered_ids = visible_ids[:, ::4]
    patches = patchify(images, (4, 4))
    for changed in (hidden_ids, covered_ids):
        index = changed[..., None].expand(-1, -1, 48)
        patches = patches.scatter(1, index, torch.randn(*changed.shape, 48))
    others = unpatchify(patches, encoder.grid, (4, 4))
    assert not torch.equal(images, others)
    for one, other in zip(
        model(images, visible_ids, hidden_ids, covered_ids),
        model(others, visible_ids, hidden_ids, covered_ids),
        strict=True,
    ):
        assert torch.equal(one, other)
    # And without the cover, what was beneath it is seen.
    seen = model(others, visible_ids, hidden_ids)[0]
    assert not torch.equal(seen, model(images, visible_ids, hidden_ids)[0])


def test_a_detached_predictor_trains_itself_alone():
    encoder = VisionTransformer((16, 16), (4, 4), 3, 32, 1, 2)
    for detach in (True, False):
        model = MaskedImageModel(encoder, 32, 1, 2, detach_predictor=detach)
        model.zero_grad()
        visible_ids, hidden_ids = torch.tensor([[0, 5]]), torch.tensor([[1, 2, 3]])
        model(torch.randn(1, 3, 16, 16), visible_ids, hidden_ids)[1].sum().backward()
        assert model.predictor.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
        assert (model.decoder_embed.weight.grad is None) == detach
        assert (encoder.patch_embed.proj.weight.grad is None) == detach

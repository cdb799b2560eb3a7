"""timm's encoders on a subset of their patches, against timm itself, and from end to end."""

import json
import sys

import pytest
import torch
from helpers import TINY, stop_after, write_images
from torch.nn import functional as F

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.evals.finetune import Options as FinetuneOptions
from hpm.evals.finetune.training import check_finetune
from hpm.mining.draw import noise
from hpm.mining.masking import hide_top
from hpm.models.architecture import nearest_size, resolve_model
from hpm.models.build import build_classifier, build_encoder
from hpm.models.hiera import HieraEncoder
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import patchify, unpatchify
from hpm.models.timm_encoder import TimmEncoder, pretrained_weights, timm_encoder
from hpm.models.timm_models import timm_shape
from hpm.training.build import build_run
from hpm.training.optim import layer_decay_groups, parameter_groups
from hpm.weights.checkpoint import load_checkpoint

timm = need("timm", "timm", "these tests")

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# Name and number of prefix tokens.
PLAIN = {
    "vit_tiny_patch16_224": 1,  # class token, learned positions
    "deit3_small_patch16_224": 1,  # no position for the class token, layer scale
    "deit_tiny_distilled_patch16_224": 2,  # class and distillation token
    "vit_small_patch14_dinov2": 1,
    "vit_small_patch14_reg4_dinov2": 5,  # registers
    "vit_medium_patch16_gap_256": 0,  # no class token, average pool
    "vit_small_patch16_18x2_224": 1,  # parallel blocks
    "vit_base_patch16_xp_224": 1,  # attention and MLP at once
    "vit_base_patch16_clip_224": 1,  # a norm in front of the blocks
    "vit_base_patch16_siglip_224": 0,  # attention pooling, which is left behind
    "eva_giant_patch14_224": 1,  # Eva without rotary positions
    "eva02_tiny_patch14_224": 1,  # added and rotary positions
    "vit_small_patch16_rope_224": 1,  # rotary positions alone
    "vit_small_patch16_rope_mixed_ape_224": 1,  # learned rotations, of each block
    "vit_base_patch16_rope_reg1_gap_256": 1,  # a register, no class token
    "vit_small_patch16_dinov3": 5,
    "vit_pe_core_tiny_patch16_384": 1,
}
HIERA_SMALL = {"embed_dim": 16, "stages": (1, 2, 2, 1), "num_heads": 1}
HIERAS = ("hiera_tiny_224", "hiera_small_abswin_256")


def plain(name, image_size=(32, 48), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TimmEncoder(name, image_size, (8, 8), 3, **(SMALL | options)).eval()


def hiera(name, image_size=(96, 64), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HieraEncoder(name, image_size, **(HIERA_SMALL | options)).eval()


def roughened(encoder):
    """Random parameters: initial ones hide mistakes (zeros, tiny scales)."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder


def some_ids(encoder, batch=3, share=0.6):
    number = int(encoder.num_patches * share)
    return hide_top(noise(torch.arange(batch), encoder.num_patches, 0, 0), number)


def with_other_pixels(images, encoder, hidden_ids):
    patches = patchify(images, encoder.patch_size)
    index = hidden_ids[..., None].expand(-1, -1, patches.shape[-1])
    other = patches.scatter(1, index, 1e4)
    return unpatchify(other, encoder.grid, encoder.patch_size)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_encoders_compute_what_timm_does(name):
    encoder = roughened(plain(name))
    assert (encoder.grid, encoder.num_patches, encoder.patch_size) == ((4, 6), 24, (8, 8))
    assert encoder.num_prefix_tokens == PLAIN[name]
    reference = timm.create_model(
        name, num_classes=0, img_size=(32, 48), patch_size=8, in_chans=3, **SMALL
    ).eval()
    pooled_norm = isinstance(reference.norm, torch.nn.Identity)
    weights = {
        n.replace("norm.", "fc_norm.") if pooled_norm and n.startswith("norm.") else n: t
        for n, t in encoder.state_dict().items()
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and all(n.startswith(("head", "attn_pool")) for n in missing)
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        expected = reference.forward_features(images)
        expected = reference.fc_norm(expected) if pooled_norm else expected
        everything = torch.arange(24).expand(3, -1)
        assert expected.shape == (3, 24 + encoder.num_prefix_tokens, 48)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder(images, everything), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_positions_belong_to_the_kept_patches(name):
    """Another order changes nothing but the order; another place changes everything."""
    encoder = roughened(plain(name))
    prefix = encoder.num_prefix_tokens
    images = torch.randn(3, 3, 32, 48)
    visible_ids = some_ids(encoder)[0]
    with torch.no_grad():
        tokens = encoder(images, visible_ids)
        flipped = encoder(images, visible_ids.flip(1))
        back = torch.cat([flipped[:, :prefix], flipped[:, prefix:].flip(1)], dim=1)
        torch.testing.assert_close(back, tokens, rtol=1e-4, atol=1e-4)
        moved = patchify(images, (8, 8)).roll(1, dims=1)
        moved = encoder(unpatchify(moved, (4, 6), (8, 8)), (visible_ids + 1) % 24)
        assert (moved - tokens).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*PLAIN, *HIERAS])
def test_nothing_hidden_reaches_the_encoder(name):
    encoder = roughened(hiera(name) if name in HIERAS else plain(name))
    images = torch.randn(3, 3, *encoder.image_size)
    visible_ids, hidden_ids = some_ids(encoder)
    other = with_other_pixels(images, encoder, hidden_ids)
    with torch.no_grad():
        tokens = encoder(images, visible_ids)
        assert tokens.shape[1] == encoder.num_prefix_tokens + visible_ids.shape[1]
        assert torch.equal(tokens, encoder(other, visible_ids))
        assert not torch.equal(encoder(images), encoder(other))


@pytest.mark.parametrize("name", HIERAS)
def test_hiera_computes_what_timm_does(name):
    encoder = roughened(hiera(name))
    assert (encoder.grid, encoder.patch_size, encoder.embed_dim) == ((3, 2), (32, 32), 128)
    reference = timm.create_model(name, num_classes=0, img_size=(96, 64), **HIERA_SMALL).eval()
    weights = {
        f"head.{n}" if n.startswith("norm.") else n: t for n, t in encoder.state_dict().items()
    }
    reference.load_state_dict(weights)
    images = torch.randn(3, 3, 96, 64)
    visible_ids = torch.tensor([[0, 3, 5], [1, 2, 4], [0, 1, 2]])
    keep = torch.zeros(3, 6, dtype=torch.bool).scatter(1, visible_ids, True)
    with torch.no_grad():
        for ids, mask in ((None, None), (visible_ids, keep)):
            expected = reference.head.norm(reference.forward_features(images, mask=mask))
            torch.testing.assert_close(encoder(images, ids), expected, rtol=1e-4, atol=1e-4)
        shuffled = encoder(images, visible_ids.flip(1))
        torch.testing.assert_close(shuffled.flip(1), encoder(images, visible_ids))


@pytest.mark.parametrize("name", HIERAS)
def test_hieras_pyramid(name):
    encoder = hiera(name)
    images = torch.randn(2, 3, 96, 64)
    maps = encoder.pyramid(images)
    shapes = [(2, 16, 24, 16), (2, 32, 12, 8), (2, 64, 6, 4), (2, 128, 3, 2)]
    assert [tuple(m.shape) for m in maps] == shapes
    reference = timm.create_model(name, num_classes=0, img_size=(96, 64), **HIERA_SMALL).eval()
    reference.load_state_dict(encoder.state_dict(), strict=False)
    for ours, theirs in zip(maps, reference.forward_intermediates(images, intermediates_only=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def architecture(name, image_size=32, **options):
    config = PretrainConfig("demo", "out", model=f"timm/{name}", image_size=image_size, **options)
    return resolve_model(config)


def test_the_architecture_is_known_before_the_model_is_built():
    before = torch.get_rng_state()
    found = architecture("vit_tiny_patch16_224", channels=4)
    assert found.decoders.decoder_dim == 128 and found.class_token
    assert (found.embed_dim, found.depth, found.num_heads) == (192, 12, 3)
    assert (found.image_size, found.patch_size) == ((32, 32), (16, 16))
    assert found.model == "timm/vit_tiny_patch16_224"
    hiera = architecture("hiera_tiny_224", 64)
    assert (hiera.embed_dim, hiera.patch_size) == (768, (32, 32))
    assert hiera.num_heads is None and not hiera.class_token
    assert nearest_size(200).embed_dim == 192 and nearest_size(2000).embed_dim == 1280
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hiera_tiny_224"])
def test_building_leaves_the_random_state_alone(name):
    found = architecture(name, 64)
    before = torch.get_rng_state()
    first, second, other = (build_encoder(found, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


def test_prefix_tokens_have_no_decoder_position():
    for name in ("vit_small_patch14_reg4_dinov2", "vit_medium_patch16_gap_256"):
        model = MaskedImageModel(plain(name), 16, 1, 2)
        assert model.decoder_pos_embed.shape == (1, 25, 16)
        visible_ids, hidden_ids = some_ids(model.encoder)
        images = torch.randn(3, 3, 32, 48)
        prediction, predicted_loss = model(images, visible_ids, hidden_ids)
        assert prediction.shape == (3, 14, 192) and predicted_loss.shape == (3, 14)
        features, predicted_loss = model.predict_loss(images)
        assert features.shape[1] == 24 + model.encoder.num_prefix_tokens
        assert predicted_loss.shape == (3, 24)
        # The tokens of the decoders less what they have without positions.
        tokens = model._decoder_tokens(model.encoder(images, visible_ids), visible_ids, hidden_ids)
        positions = model.decoder_pos_embed.clone()
        model.decoder_pos_embed.zero_()
        bare = model._decoder_tokens(model.encoder(images, visible_ids), visible_ids, hidden_ids)
        prefix = model.encoder.num_prefix_tokens
        assert torch.equal(tokens[:, :prefix], bare[:, :prefix])
        expected = positions[0, 1 + torch.cat([visible_ids, hidden_ids], dim=1)]
        torch.testing.assert_close((tokens - bare)[:, prefix:], expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "timm/vit_tinny_patch16_224"}, ["timm does not have", "vit_tiny_patch16_224'?"]),
        ({"model": "timm/vit_tiny_patch16_224.augreg"}, ["timm does not have", "augreg_in21k"]),
        ({"model": "timm/resnet50"}, ["timm/resnet50 cannot run on a subset", "neither a plain"]),
        ({"model": "timm/swin_tiny_patch4_window7_224"}, ["cannot run on a subset", "windows"]),
        ({"model": "timm/beit_base_patch16_224"}, ["cannot run on a subset", "bias for each pair"]),
        ({"model": "timm/vit_tiny_r_s16_p8_224"}, ["cannot run on a subset", "convolutional"]),
        ({"model": "vit_tinyy"}, ["model is 'vit_tinyy'", "'vit_tiny'?", "timm/NAME"]),
        ({"model": "timm/hiera_tiny_224", "patch_size": 16}, ["mask units", "32 x 32"]),
        ({"model": "timm/hiera_tiny_224", "image_size": 80}, ["patch_size 32", "--image-size 64"]),
        ({"model": "vit_tiny", "pretrained": True}, ["pretrained", "timm/NAME"]),
        ({"model": "timm/vit_base_patch16_xp_224", "pretrained": True}, ["timm has no weights"]),
        ({"model": "timm/vit_tiny_patch16_224", "pretrained": True, "init": "x"}, ["one of them"]),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(tmp_path, options, words):
    given = {"image_size": 64} | options
    with pytest.raises(UserError) as refused:
        hpm.pretrain(data=str(tmp_path / "nowhere"), out=str(tmp_path / "run"), **given)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    for word in words:
        assert word in str(refused.value)


def test_timm_missing(monkeypatch):
    timm_shape.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm: pip install 'hpm-vision\[timm\]'"):
        architecture("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("reachable", "why"), [(True, "no such file at all"), (False, "the network cannot be reached")]
)
def test_weights_that_are_nowhere(reachable, why, monkeypatch, tmp_path):
    """Without a network at once, rather than after a minute of attempts."""
    from huggingface_hub import constants

    def absent(*arguments, **options):
        assert constants.HF_HUB_OFFLINE is not reachable
        raise OSError("no such file\nat all")

    encoder = plain("vit_tiny_patch16_224")
    monkeypatch.setattr(timm, "create_model", absent)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: reachable)
    with pytest.raises(UserError, match=rf"\({why}\); looked for in .*hub"):
        pretrained_weights(encoder)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_medium_patch16_gap_256", *HIERAS])
def test_pretrained_weights_are_fitted(name, tmp_path):
    """From a file in place of the hub; another image size, patch size and number of channels."""
    small = HIERA_SMALL if name in HIERAS else SMALL
    published = timm.create_model(name, num_classes=1000, **small)
    file = tmp_path / "weights.pt"
    torch.save(published.state_dict(), file)
    sizes = ((96, 64), None, 1) if name in HIERAS else ((32, 48), (8, 8), 1)
    encoder = timm_encoder(
        name, **dict(zip(("image_size", "patch_size", "channels"), sizes)), **small
    )
    before = torch.get_rng_state()
    found = pretrained_weights(encoder, **small, pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(torch.get_rng_state(), before)
    encoder.load_state_dict(found)
    weights = published.state_dict()
    for ours, theirs in (("blocks.1.mlp.fc1.weight",) * 2, ("patch_embed.proj.bias",) * 2):
        assert torch.equal(found[ours], weights[theirs])
    if name == "hiera_tiny_224":
        square = weights["pos_embed"].reshape(1, 56, 56, 16).permute(0, 3, 1, 2)
        shrunk = F.interpolate(square, (24, 16), mode="bicubic", antialias=True)
        shrunk = shrunk.flatten(2).transpose(1, 2)
        torch.testing.assert_close(found["pos_embed"], shrunk)


def test_a_run_begins_with_pretrained_weights(monkeypatch, tmp_path, image_folder):
    marked = build_encoder(architecture("vit_tiny_patch16_224"), 5).state_dict()
    monkeypatch.setattr("hpm.training.build.pretrained_weights", lambda encoder: marked)
    config = PretrainConfig(
        str(image_folder),
        str(tmp_path / "run"),
        **TINY
        | {
            "model": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "patch_size": None,
            "pretrained": True,
        },
    )
    state = build_run(config, torch.device("cpu"))
    state.log.close()
    for name, tensor in state.model.encoder.state_dict().items():
        assert torch.equal(tensor, marked[name])
    for a, b in zip(state.model.parameters(), state.teacher.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "image_size", "resized"),
    [
        ("vit_tiny_patch16_224", 32, (48, 32)),
        ("vit_small_patch16_dinov3", 32, (48, 32)),
        ("hiera_tiny_224", 64, (96, 64)),
        ("hiera_small_abswin_256", 64, (96, 64)),
    ],
)
def test_fine_tuning(name, image_size, resized):
    found = architecture(name, image_size)
    weights = build_encoder(found, 1).state_dict()
    classifier = build_classifier(found, weights, 5, image_size=resized, drop_path=0.1)
    assert classifier(torch.randn(2, 3, *resized)).shape == (2, 5)
    for key, tensor in classifier.encoder.state_dict().items():
        if key != "pos_embed" and not key.startswith("norm."):
            assert torch.equal(tensor, weights[key]), key
    groups = layer_decay_groups(classifier, 1e-3, 0.5, 0.05)
    scale = {p: g["lr_scale"] for g in groups for p in g["params"]}
    decay = {p: g["weight_decay"] for g in groups for p in g["params"]}
    trained = dict(classifier.named_parameters())
    assert set(scale) == {p for p in trained.values() if p.requires_grad}
    depth = found.depth
    for key, parameter in trained.items():
        if key.startswith("encoder.blocks."):
            assert scale[parameter] == 0.5 ** (depth - int(key.split(".")[2]))
        elif key.startswith("encoder."):
            assert scale[parameter] == 0.5 ** (depth + 1), key
        else:
            assert scale[parameter] == 1
    for key in ("pos_embed", "pos_embed_win", "cls_token", "reg_token"):
        if f"encoder.{key}" in trained:
            assert decay[trained[f"encoder.{key}"]] == 0
    rates = [m.drop_prob for m in classifier.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.1)


def test_resized_positions_are_timms():
    encoder, larger = plain("deit3_small_patch16_224"), plain("deit3_small_patch16_224", (48, 64))
    reference = timm.create_model(
        "deit3_small_patch16_224", num_classes=0, img_size=(32, 48), patch_size=8, **SMALL
    )
    reference.load_state_dict(encoder.state_dict())
    reference.set_input_size((48, 64))
    found = larger.fit_positions(encoder.state_dict(), encoder.grid)
    torch.testing.assert_close(found["pos_embed"], reference.pos_embed.data)


def test_no_class_token_no_pooling_of_it():
    found = architecture("hiera_tiny_224", 64)
    with pytest.raises(UserError, match="timm/hiera_tiny_224 has no class token, pass --pool mean"):
        check_finetune(FinetuneOptions("run", "data", pool="cls"), found)
    with pytest.raises(ValueError, match="no class token"):
        build_classifier(found, None, 3, pool="cls")
    assert check_finetune(FinetuneOptions("run", "data"), found) is None


def test_learned_rotations_do_not_decay():
    encoder = plain("vit_small_patch16_rope_mixed_ape_224")
    decayed, other = parameter_groups(encoder, 0.05)
    assert any(p is encoder.rope.freqs for p in other["params"])
    assert not any(p is encoder.rope.freqs for p in decayed["params"])


# Options of a short run beside TINY's.
RUNS = {
    "vit_tiny_patch16_224": {"image_size": 32, "patch_size": 8},
    "hiera_tiny_224": {"image_size": 64, "patch_size": None, "batch_size": 4, "mask_ratio": 0.5},
}


def run_options(name, **changes):
    own = {"model": f"timm/{name}", "base_lr": 1e-3, "decoder_heads": 2}
    return TINY | own | RUNS[name] | changes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "hiera" in name else ()) for name in RUNS]
)
def test_from_end_to_end(name, tmp_path, monkeypatch):
    options = run_options(name, steps=3, checkpoint_every="2 steps")
    data = str(write_images(tmp_path / "images", per_class=8, size=40))
    run = hpm.pretrain(data=data, out=str(tmp_path / "run"), **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        hpm.pretrain(data=data, out=str(tmp_path / "again"), **options)
    again = hpm.pretrain(data=data, out=str(tmp_path / "again"), **options)
    first, second = (load_checkpoint(r.latest_checkpoint()) for r in (run, again))
    for part in ("model", "teacher", "optimizer"):
        theirs = getattr(second, part)
        assert all(torch.equal(t, theirs[n]) for n, t in getattr(first, part).items()), part

    result = hpm.evaluate("knn", str(run.folder), data, workers=0, device="cpu", k=(5,))
    rows = set(result.values)
    assert {"trained, patch mean", "random weights, patch mean"} <= rows
    has_class_token = "trained, class token" in rows
    assert has_class_token == (name == "vit_tiny_patch16_224")

    encoder = run.load_encoder()
    size = RUNS[name]["image_size"]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    pooled, patches = encoder(images)
    assert patches.shape == (2, encoder.encoder.num_patches, encoder.encoder.embed_dim)
    assert torch.equal(hpm.load_encoder(run.backbone)(images)[0], pooled)
    about = json.loads(run.backbone.with_suffix(".json").read_text())
    assert about["model"] == f"timm/{name}" and about["class_token"] == has_class_token
    if not has_class_token:
        with pytest.raises(UserError, match="no class token: take pool='mean'"):
            hpm.load_encoder(run.folder, pool="cls")

    # Another run begins with all of its weights, or with those of the backbone.
    init, partial = (run.folder, False) if has_class_token else (run.backbone, True)
    given = options | {"init": str(init), "init_partial": partial}
    state = build_run(PretrainConfig(data, str(tmp_path / "from"), **given), torch.device("cpu"))
    state.log.close()
    for key, tensor in state.model.encoder.state_dict().items():
        assert torch.equal(tensor, first.model[f"encoder.{key}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_loss_falls(name, tmp_path):
    options = run_options(name, steps=150, batch_size=8, log_every=10, base_lr=8e-3)
    run = hpm.pretrain(data="demo", out=str(tmp_path / "run"), **options)
    losses = [m["reconstruction_loss"] for m in run.metrics() if "reconstruction_loss" in m]
    assert sum(losses[-5:]) / 5 < 0.95 * sum(losses[:3]) / 3

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpm.core.config import PretrainConfig
from hpm.mining.draw import noise
from hpm.mining.losses import relative_loss, squared_error
from hpm.mining.masking import hide_top
from hpm.mining.teacher import Teacher, predicted_losses
from hpm.models.architecture import SIZES, Architecture, resolve_model
from hpm.models.build import build_model
from hpm.models.patches import gather_patches, patchify, unpatchify
from hpm.models.vit import Block, VisionTransformer


def small(image_size=(16, 24), patch_size=(4, 8), channels=3, with_predictor=True):
    shape = {
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": channels,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "with_predictor": with_predictor,
    }
    return build_model(Architecture.from_json(shape))


def some_ids(model, batch=2, num_hidden=8):
    return hide_top(noise(torch.arange(batch), model.encoder.num_patches, 0, 0), num_hidden)


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize(
    "sizes", [((16, 24), (4, 8)), ((12, 12), (3, 3)), ((8, 16, 16), (2, 8, 8))]
)
def test_any_size_and_any_number_of_channels(sizes, channels):
    image_size, patch_size = sizes
    if len(image_size) == 3:
        encoder = VisionTransformer(image_size, patch_size, channels, 48, 1, 2)
        assert encoder(torch.randn(2, channels, *image_size)).shape == (2, 17, 48)
        return
    model = small(image_size, patch_size, channels)
    visible_ids, hidden_ids = some_ids(model)
    images = torch.randn(2, channels, *image_size)
    prediction, predicted_loss = model(images, visible_ids, hidden_ids)
    assert prediction.shape == (2, 8, patch_size[0] * patch_size[1] * channels)
    assert predicted_loss.shape == (2, 8)
    features, predicted_loss = model.predict_loss(images)
    assert features.shape == (2, 1 + model.encoder.num_patches, 32)
    assert predicted_loss.shape == (2, model.encoder.num_patches)


def test_nothing_hidden_reaches_the_encoder():
    model = small()
    visible_ids, hidden_ids = some_ids(model)
    images = torch.randn(2, 3, 16, 24)
    patches = patchify(images, (4, 8))
    index = hidden_ids[..., None].expand(-1, -1, patches.shape[-1])
    other = unpatchify(patches.scatter(1, index, torch.full_like(patches, 1e6)), (4, 3), (4, 8))
    assert not torch.equal(images, other)
    assert torch.equal(model.encoder(images, visible_ids), model.encoder(other, visible_ids))
    for ours, others in zip(
        model(images, visible_ids, hidden_ids), model(other, visible_ids, hidden_ids), strict=True
    ):
        assert torch.equal(ours, others)


def test_order_of_the_tokens_does_not_matter():
    model = small()
    visible_ids, hidden_ids = some_ids(model)
    images = torch.randn(2, 3, 16, 24)
    prediction, predicted_loss = model(images, visible_ids, hidden_ids)
    flipped, flipped_loss = model(images, visible_ids.flip(1), hidden_ids.flip(1))
    torch.testing.assert_close(flipped.flip(1), prediction)
    torch.testing.assert_close(flipped_loss.flip(1), predicted_loss)


def test_the_teacher_never_gets_gradients():
    model = small()
    teacher = Teacher(model)
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    images = torch.randn(2, 3, 16, 24)
    features, mined = predicted_losses(teacher.model.predict_loss, images)
    assert not features.requires_grad and not mined.requires_grad
    visible_ids, hidden_ids = some_ids(model)
    prediction, predicted_loss = model(images, visible_ids, hidden_ids)
    target = gather_patches(patchify(images, (4, 8)), hidden_ids)
    patch_loss = squared_error(prediction, target)
    (patch_loss.mean() + relative_loss(predicted_loss, patch_loss)[0]).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_teacher_is_the_moving_average():
    model = small()
    teacher = Teacher(model)
    expected = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    for decay in (0.9, 0.5):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        teacher.update(model, decay)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, parameter in teacher.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_predictors_loss_trains_the_encoder():
    model = small()
    visible_ids, hidden_ids = some_ids(model)
    _, predicted_loss = model(torch.randn(2, 3, 16, 24), visible_ids, hidden_ids)
    relative_loss(predicted_loss, torch.rand(2, 8))[0].backward()
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


def test_initialisation():
    model = small((224, 224), (16, 16))
    weight = model.encoder.patch_embed.proj.weight.flatten(1)
    bound = (6 / sum(weight.shape)) ** 0.5
    assert bound * 0.95 < weight.abs().max() <= bound
    assert model.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    assert not model.encoder.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad
    norm = model.encoder.blocks[0].norm1
    assert norm.eps == 1e-6 and (norm.weight == 1).all()


def test_building_a_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = small(), small()
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_predictor():
    model = small(with_predictor=False)
    assert model(torch.randn(2, 3, 16, 24), *some_ids(model))[1] is None
    with pytest.raises(ValueError, match="no loss predictor"):
        model.predict_loss(torch.randn(2, 3, 16, 24))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_tiny", 5.5),
        ("vit_small", 21.7),
        ("vit_base", 85.8),
        ("vit_large", 303.3),
        ("vit_huge", 630.8),
    ],
)
def test_sizes_are_the_usual_ones(name, millions):
    config = PretrainConfig("demo", "out", model=name)
    with torch.device("meta"):
        model = build_model(resolve_model(config))
    parameters = sum(p.numel() for p in model.encoder.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.2)
    assert set(SIZES) == {"vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"}


def test_the_last_outputs_alone():
    """Of the last block only what is read is computed, and it is the same."""
    torch.manual_seed(0)
    block = Block(32, 4)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(block(x, 4), block(x)[:, -4:])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointed_activations_give_the_same_gradients(checkpointed):
    model = small()
    for part in (model.encoder, model.reconstructor, model.predictor):
        part.checkpoint_activations = checkpointed
    visible_ids, hidden_ids = some_ids(model)
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    prediction, predicted_loss = model(images, visible_ids, hidden_ids)
    (prediction.square().mean() + predicted_loss.square().mean()).backward()
    plain = small()
    prediction, predicted_loss = plain(images, visible_ids, hidden_ids)
    (prediction.square().mean() + predicted_loss.square().mean()).backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


def test_the_predicted_loss_is_the_mean_of_the_head_in_float32():
    """As one linear layer, also where everything else runs in bfloat16."""
    model = small()
    nn.init.normal_(model.predictor.head.bias)
    tokens = torch.randn(3, 9, 16)
    features = model.predictor.features(tokens, 4).double()
    head = model.predictor.head.double()
    naive = F.linear(features, head.weight, head.bias).mean(-1)
    model.predictor.float()
    torch.testing.assert_close(model.predictor(tokens, 4).double(), naive, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.predictor.features(tokens, 4)
        predicted = model.predictor(tokens, 4)
    assert predicted.dtype == torch.float32
    head = model.predictor.head.double()
    naive = F.linear(features.double(), head.weight, head.bias).mean(-1)
    torch.testing.assert_close(predicted.double(), naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"with_predictor": False}, {"target_dim": 7}, {"predictor_dim": 16}, {"with_cover": True}],
)
def test_models_of_one_seed_differ_only_in_what_one_of_them_lacks(change):
    shape = resolve_model(PretrainConfig("demo", "out", model="vit_nano", image_size=32))
    changed = replace(shape, decoders=replace(shape.decoders, **change))
    one, other = build_model(shape, 5).state_dict(), build_model(changed, 5).state_dict()
    same = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert all(torch.equal(one[name], other[name]) for name in same)
    parts = {name.split(".")[0] for name in same}
    assert {"encoder", "decoder_embed", "mask_token", "reconstructor"} <= parts
    another = build_model(shape, 6).state_dict()
    drawn = [name for name in one if one[name].std() > 0 and "pos_embed" not in name]
    assert not any(torch.equal(one[name], another[name]) for name in drawn)

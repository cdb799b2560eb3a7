import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hpm
from hpm.models.architecture import Architecture
from hpm.models.build import resized_encoder
from hpm.models.pyramid import blocks_to_read, doublings, rescaling
from hpm.models.segmenter import (
    LinearSegmenter,
    UPerNetSegmenter,
    segmentation_loss,
    sliding_window,
)
from hpm.models.timm_encoder import timm_encoder
from hpm.models.upernet import POOLED_SIZES, UPerNetHead, resize
from hpm.models.vit import VisionTransformer
from hpm.training.optim import layer_decay_groups


def nano(image_size=(64, 64), patch_size=16, depth=2, **options):
    return VisionTransformer(image_size, (patch_size, patch_size), 3, 32, depth, 2, **options)


def test_blocks_to_read():
    assert blocks_to_read(12) == [3, 5, 7, 11]
    assert blocks_to_read(24) == [7, 11, 15, 23]
    assert blocks_to_read(32) == [7, 15, 23, 31]
    assert blocks_to_read(4) == [0, 1, 2, 3]
    assert blocks_to_read(2) == [0, 0, 1, 1]
    assert blocks_to_read(1) == [0, 0, 0, 0]


@given(depth=st.integers(1, 60))
def test_blocks_to_read_rise_evenly_to_the_last(depth):
    blocks = blocks_to_read(depth)
    assert len(blocks) == 4 and blocks == sorted(blocks)
    assert blocks[0] >= 0 and blocks[-1] == depth - 1
    if depth >= 4:
        assert len(set(blocks)) == 4


@pytest.mark.parametrize("name", ["hpm", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_feature_maps_are_the_tokens_between_blocks(name):
    encoder = nano((32, 48)) if name == "hpm" else timm_encoder(name, image_size=(32, 48), depth=2)
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    images = torch.randn(2, 3, 32, 48)
    first, last, again = encoder.feature_maps(images, [0, 1, 0])
    assert first.shape == (2, encoder.embed_dim, 2, 3)
    assert torch.equal(first, again)
    for found, tokens in zip((first, last), outputs):
        for row in range(2):
            for column in range(3):
                place = encoder.num_prefix_tokens + 3 * row + column
                assert torch.equal(found[:, :, row, column], tokens[:, place])
    assert torch.equal(encoder.norm(outputs[1]), encoder(images))


def test_feature_maps_of_other_sizes_equal_those_of_an_encoder_built_for_them():
    small = nano((32, 32))
    found = Architecture(
        image_size=(32, 32), patch_size=(16, 16), channels=3, embed_dim=32, depth=2, num_heads=2
    )
    large = resized_encoder(found, small.state_dict(), (64, 96))
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(small.feature_maps(images, [1])[0], large.feature_maps(images, [1])[0])
    assert small.feature_maps(images, [1])[0].shape == (1, 32, 4, 6)


def test_encoders_without_maps_say_so():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(hpm.UserError, match="was built for"):
        timm_encoder("vit_tiny_patch16_224", image_size=(32, 32), depth=1).feature_maps(images, [0])
    with pytest.raises(hpm.UserError, match="take a plain ViT"):
        timm_encoder("hiera_tiny_224", image_size=(64, 64)).feature_maps(images, [0])
    with pytest.raises(hpm.UserError, match="square patches"):
        UPerNetSegmenter(VisionTransformer((64, 64), (16, 8), 3, 32, 2, 2), 5)


@pytest.mark.parametrize(
    "patch_size, expected",
    [
        (2, [-1, -2, -3, -4]),
        (8, [1, 0, -1, -2]),
        (14, [2, 1, 0, -1]),
        (16, [2, 1, 0, -1]),
        (32, [3, 2, 1, 0]),
    ],
)
def test_doublings(patch_size, expected):
    assert doublings(nano((224, 224), patch_size, depth=1)) == expected


def test_rescaling_keeps_odd_maps_whole():
    x = torch.randn(1, 8, 5, 7)
    assert rescaling(-1, [8], nn.BatchNorm2d)(x).shape == (1, 8, 3, 4)
    assert rescaling(-2, [8], nn.BatchNorm2d)(x).amax() == x.amax()
    assert rescaling(0, [8], nn.BatchNorm2d)(x) is x
    assert rescaling(2, [8, 4, 2], nn.BatchNorm2d)(x).shape == (1, 2, 20, 28)


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_shapes_strides_and_gradients(patch_size, size):
    torch.manual_seed(0)
    encoder = nano(size, patch_size, drop_path=0.1)
    model = UPerNetSegmenter(encoder, 5, channels=16, auxiliary_channels=8)
    images = torch.randn(2, 3, *size)
    for stride, features in zip((4, 8, 16, 32), model.feature_pyramid(images), strict=True):
        assert features.shape == (2, 32, size[0] // stride, size[1] // stride)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 5, *size)
    segmentation_loss(logits, auxiliary, torch.randint(5, (2, *size))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.eval()(images).shape == (2, 5, *size)


def test_timm_encoders_under_upernet():
    model = UPerNetSegmenter(
        timm_encoder("vit_tiny_patch16_224", image_size=(64, 64), depth=2), 3, 8
    )
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_one_image_cannot_be_normed_over_the_batch():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(hpm.UserError, match="2 or more"):
        UPerNetSegmenter(nano(), 5, 16)(images)
    model = UPerNetSegmenter(nano(), 5, 16, norm_layer=lambda dim: nn.GroupNorm(4, dim))
    assert model(images)[0].shape == (1, 5, 64, 64)


def test_norms_can_be_synchronised():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(UPerNetSegmenter(nano(), 5, 16))
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    given = UPerNetSegmenter(nano(), 5, 16, norm_layer=nn.SyncBatchNorm)
    assert given.state_dict().keys() == model.state_dict().keys()


def naive_resize(x, size):
    """Bilinear, half-pixel centres, by hand."""
    out = x.new_zeros(*x.shape[:2], *size)
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * x.shape[2] / size[0] - 0.5, 0), x.shape[2] - 1)
            z = min(max((column + 0.5) * x.shape[3] / size[1] - 0.5, 0), x.shape[3] - 1)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, x.shape[2] - 1), min(z0 + 1, x.shape[3] - 1)
            top = x[:, :, y0, z0] * (1 - z + z0) + x[:, :, y0, z1] * (z - z0)
            bottom = x[:, :, y1, z0] * (1 - z + z0) + x[:, :, y1, z1] * (z - z0)
            out[:, :, row, column] = top * (1 - y + y0) + bottom * (y - y0)
    return out


def naive_convolution(layer, x):
    """A ConvNormRelu in evaluation, place by place."""
    convolution, norm, _ = layer
    reach = convolution.kernel_size[0] // 2
    rows, columns = x.shape[2:]
    out = x.new_zeros(len(x), len(convolution.weight), rows, columns)
    for row in range(rows):
        for column in range(columns):
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    if 0 <= row + i < rows and 0 <= column + j < columns:
                        weight = convolution.weight[:, :, i + reach, j + reach]
                        out[:, :, row, column] += x[:, :, row + i, column + j] @ weight.T
    shape = (1, -1, 1, 1)
    out = (out - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return (out * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)


def naive_pool(x, cells):
    """Averages over cells whose borders are rounded outwards."""
    out = x.new_zeros(*x.shape[:2], cells, cells)
    for i in range(cells):
        for j in range(cells):
            rows = slice(i * x.shape[2] // cells, -(-(i + 1) * x.shape[2] // cells))
            columns = slice(j * x.shape[3] // cells, -(-(j + 1) * x.shape[3] // cells))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


@torch.no_grad()
def test_the_head_equals_a_naive_one_in_float64():
    torch.manual_seed(0)
    head = UPerNetHead(6, 5, 3).double().eval()
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                values.normal_()
            module.running_var.uniform_(0.5, 2)
    maps = [torch.randn(2, 6, 16 // n, 24 // n).double() for n in (1, 2, 4, 8)]

    coarsest = maps[3]
    pooled = [coarsest]
    for cells, (_, layer) in zip(POOLED_SIZES, head.pooling.pooled, strict=True):
        averages = naive_convolution(layer, naive_pool(coarsest, cells))
        pooled.append(naive_resize(averages, coarsest.shape[2:]))
    sums = [naive_convolution(head.pooling.fuse, torch.cat(pooled, 1))]
    torch.testing.assert_close(head.pooling(coarsest), sums[0])
    for level in (2, 1, 0):
        side = naive_convolution(head.lateral[level], maps[level])
        sums.insert(0, side + naive_resize(sums[0], side.shape[2:]))
    levels = [naive_convolution(head.smooth[n], sums[n]) for n in range(3)] + [sums[3]]
    levels = [naive_resize(x, (16, 24)) for x in levels]
    fused = naive_convolution(head.fuse, torch.cat(levels, 1))
    torch.testing.assert_close(head.fused(maps), fused)
    scores = torch.einsum("bdhw,cd->bchw", fused, head.classifier[1].weight[:, :, 0, 0])
    torch.testing.assert_close(head(maps), scores + head.classifier[1].bias.view(1, -1, 1, 1))


def test_size_of_the_published_model():
    with torch.device("meta"):
        model = UPerNetSegmenter(VisionTransformer((512, 512)), 150)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 160 < millions < 168  # 164 with MAE's ViT-B


def test_the_linear_head_is_linear_in_standardised_tokens_of_a_frozen_encoder():
    torch.manual_seed(0)
    encoder = nano((64, 96), 8)
    model = LinearSegmenter(encoder, 5)
    images = torch.randn(3, 3, 64, 96)
    logits = model(images)
    assert logits.shape == (3, 5, 64, 96)
    tokens = encoder(images)[:, 1:].double()
    mean, deviation = tokens.mean((0, 1)), tokens.std((0, 1), unbiased=False)
    scores = (tokens - mean) / deviation @ model.head.weight[:, :, 0, 0].double().T
    expected = scores.float().transpose(1, 2).unflatten(2, (8, 12))
    expected = F.interpolate(expected, (64, 96), mode="bilinear") + model.head.bias.view(-1, 1, 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    segmentation_loss(logits, None, torch.randint(5, (3, 64, 96))).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"head.weight", "head.bias"}


def test_loss():
    main, auxiliary = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    labels = torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    labels[0, :2] = 255
    expected = 0.0
    for logits, weight in ((main, 1.0), (auxiliary, 0.4)):
        each = -logits.double().log_softmax(1)
        places = (labels != 255).nonzero().tolist()
        values = [each[b, int(labels[b, y, x]), y, x].item() for b, y, x in places]
        expected += weight * sum(values) / len(values)
    assert segmentation_loss(main, auxiliary, labels).item() == pytest.approx(expected, rel=1e-5)
    nothing = main.requires_grad_()
    loss = segmentation_loss(nothing, auxiliary, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0 and not nothing.grad.any()


@torch.no_grad()
def test_one_window_over_all_is_the_plain_model():
    model = UPerNetSegmenter(nano(), 5, 16).eval()
    images = torch.randn(2, 3, 64, 64)
    found = sliding_window(model, images, window=64, stride=43, num_classes=5)
    torch.testing.assert_close(found, model(images))


def position_dependent(images):
    """Scores that differ with the place in the window."""
    rows = torch.arange(images.shape[2]).view(-1, 1)
    columns = torch.arange(images.shape[3])
    return torch.cat([images * (1 + rows), images + columns], dim=1)


def naive_sliding_window(image, window, stride):
    padded = image.new_zeros(1, max(image.shape[1], window), max(image.shape[2], window))
    padded[:, : image.shape[1], : image.shape[2]] = image
    total, count = torch.zeros(2, *padded.shape[1:]).double(), torch.zeros(padded.shape[1:])
    y = 0
    while True:
        top = min(y, padded.shape[1] - window)
        x = 0
        while True:
            left = min(x, padded.shape[2] - window)
            scores = position_dependent(padded[None, :, top : top + window, left : left + window])[
                0
            ]
            for i in range(window):
                for j in range(window):
                    total[:, top + i, left + j] += scores[:, i, j]
                    count[top + i, left + j] += 1
            if left + window >= padded.shape[2]:
                break
            x += stride
        if top + window >= padded.shape[1]:
            break
        y += stride
    return (total / count)[:, : image.shape[1], : image.shape[2]]


@given(
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    window=st.integers(1, 6),
    stride=st.integers(1, 6),
    batch=st.integers(1, 2),
    batch_size=st.integers(1, 5),
)
def test_sliding_window_equals_a_naive_loop(height, width, window, stride, batch, batch_size):
    stride = min(stride, window)
    images = torch.randn(batch, 1, height, width)
    found = sliding_window(position_dependent, images, window, stride, 2, batch_size)
    expected = torch.stack([naive_sliding_window(x, window, stride) for x in images])
    torch.testing.assert_close(found.double(), expected)


def test_strides_that_leave_gaps():
    with pytest.raises(ValueError, match="gaps"):
        sliding_window(position_dependent, torch.zeros(1, 1, 8, 8), 4, 5, 2)


def test_resize_is_bilinear():
    x = torch.randn(1, 2, 3, 5).double()
    torch.testing.assert_close(resize(x, (7, 11)), naive_resize(x, (7, 11)))


def test_layer_decay_of_a_segmenter():
    model = UPerNetSegmenter(nano(depth=3), 5, 16)
    groups = layer_decay_groups(model, 1e-3, 0.5, 0.05)
    group = {p: g for g in groups for p in g["params"]}
    assert len(group) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        scale = 1.0
        if name.startswith("encoder.blocks."):
            scale = 0.5 ** (3 - int(name.split(".")[2]))
        elif name.startswith("encoder."):
            scale = 0.5**4
        assert group[parameter]["lr_scale"] == scale, name
        assert group[parameter]["lr"] == pytest.approx(1e-3 * scale)
        plain = parameter.ndim == 1 or name in ("encoder.pos_embed", "encoder.cls_token")
        assert group[parameter]["weight_decay"] == (0 if plain else 0.05), name
    with pytest.raises(ValueError, match="one encoder"):
        layer_decay_groups(nn.Linear(2, 2), 1e-3, 0.5, 0.05)


def test_the_linear_head_takes_any_encoder():
    for name in ("vit_small_patch16_dinov3", "hiera_tiny_224"):
        model = LinearSegmenter(timm_encoder(name, image_size=(64, 96)), 4)
        assert model(torch.randn(2, 3, 64, 96)).shape == (2, 4, 64, 96), name

from collections import OrderedDict

import pytest
import torch
from torch.nn import functional as F

import hpm
from hpm.models.detector import DetectorBackbone, PadImages, SimpleFeaturePyramid, build_detector
from hpm.models.pyramid import LayerNorm2d
from hpm.models.timm_encoder import timm_encoder
from hpm.models.vit import VisionTransformer
from hpm.training.optim import layer_decay_groups


def nano(image_size=(64, 64), patch_size=16, depth=4, **options):
    return VisionTransformer(image_size, (patch_size, patch_size), 3, 32, depth, 2, **options)


def tiny_detector(encoder=None, **options):
    """Anchors and numbers of boxes that suit images of 64 pixels."""
    torch.manual_seed(0)
    sizes = {
        "channels": 16,
        "anchor_sizes": (8, 16, 32, 48, 64),
        "rpn_pre_nms_top_n_train": 100,
        "rpn_post_nms_top_n_train": 50,
        "box_batch_size_per_image": 32,
    }
    return build_detector(encoder or nano(), 3, **(sizes | options))


def targets():
    square = torch.zeros(1, 64, 64, dtype=torch.uint8)
    square[:, 8:40, 8:40] = 1
    return [
        {"boxes": torch.tensor([[8, 8, 40, 40.0]]), "labels": torch.tensor([1]), "masks": square},
        {
            "boxes": torch.tensor([[8, 8, 40, 40.0], [0, 0, 20, 50]]),
            "labels": torch.tensor([3, 2]),
            "masks": torch.cat([square, square])[:, :, :48],
        },
    ]


@pytest.mark.parametrize("patch_size", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_strides(patch_size, size):
    backbone = DetectorBackbone(nano(size, patch_size), 16)
    maps = backbone(torch.randn(2, 3, *size))
    assert isinstance(maps, OrderedDict) and list(maps) == ["0", "1", "2", "3", "pool"]
    for stride, found in zip((4, 8, 16, 32, 64), maps.values()):
        assert found.shape == (2, 16, size[0] // stride, size[1] // stride)


def test_the_pyramid_reads_the_last_map_alone():
    torch.manual_seed(0)
    encoder = nano(depth=8)
    backbone = DetectorBackbone(encoder, 16)
    images = torch.randn(1, 3, 64, 64)
    [last] = encoder.feature_maps(images, [7])
    maps, expected = backbone(images), backbone.pyramid(last)
    for name in maps:
        assert torch.equal(maps[name], expected[name])
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])


def test_a_level_equals_a_naive_one_in_float64():
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8, 4, [2, 1, 0, -1]).double()
    x = torch.randn(1, 8, 3, 2).double()
    rescale, narrow, norm, smooth, last_norm = pyramid.levels[1]
    [transposed] = rescale
    doubled = torch.zeros(1, 4, 6, 4).double()
    for row in range(6):
        for column in range(4):
            weight = transposed.weight[:, :, row % 2, column % 2]
            value = x[0, :, row // 2, column // 2] @ weight + transposed.bias
            doubled[0, :, row, column] = value

    def normed(maps, layer):
        mean, variance = maps.mean(1, True), maps.var(1, unbiased=False, keepdim=True)
        scaled = (maps - mean) / (variance + 1e-6).sqrt()
        return scaled * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    maps = normed(torch.einsum("bdhw,cd->bchw", doubled, narrow.weight[:, :, 0, 0]), norm)
    padded = F.pad(maps, (1, 1, 1, 1))
    out = torch.zeros_like(maps)
    for row in range(6):
        for column in range(4):
            cut = padded[0, :, row : row + 3, column : column + 3]
            out[0, :, row, column] = (smooth.weight * cut).sum((1, 2, 3))
    torch.testing.assert_close(pyramid(x)["1"], normed(out, last_norm))
    assert [len(level[0]) for level in pyramid.levels] == [4, 1, 0, 1]
    assert isinstance(pyramid.levels[0][0][1], LayerNorm2d)


@pytest.mark.parametrize("masks", [True, False])
def test_a_step_of_training_and_predictions(masks):
    encoder = nano(drop_path=0.1, window_size=2)
    model = tiny_detector(encoder, masks=masks)
    images = [torch.randn(3, 64, 64), torch.randn(3, 64, 48)]
    given = targets() if masks else [{k: t[k] for k in ("boxes", "labels")} for t in targets()]
    losses = model(images, given)
    assert ("loss_mask" in losses) == masks and len(losses) == 4 + masks
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    predictions = model.eval()(images)
    for image, found in zip(images, predictions, strict=True):
        count = len(found["boxes"])
        assert found["boxes"].shape == (count, 4) and found["scores"].shape == (count,)
        assert set(found["labels"].tolist()) <= {1, 2, 3}
        if masks:
            assert found["masks"].shape == (count, 1, *image.shape[1:])
        assert (found["boxes"] <= torch.tensor([*image.shape[:0:-1]] * 2)).all()
    assert sum(len(found["boxes"]) for found in predictions) > 0


def test_boxes_are_float32_under_autocast():
    model = tiny_detector()
    images = [torch.randn(3, 64, 64), torch.randn(3, 64, 48)]
    boxes = []
    model.rpn.register_forward_hook(lambda module, inputs, output: boxes.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets())
        predictions = model.eval()(images)
    assert {x.dtype for x in [*boxes, *losses.values()]} == {torch.float32}
    assert {x.dtype for found in predictions for x in found.values()} == {
        torch.float32,
        torch.int64,
    }


def test_images_without_objects():
    model = tiny_detector()
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    losses = model([torch.randn(3, 64, 64)] * 2, [targets()[0], nothing])
    assert all(torch.isfinite(loss) for loss in losses.values())
    losses = model([torch.randn(3, 64, 64)], [nothing])
    assert losses["loss_box_reg"] == losses["loss_mask"] == 0


@pytest.mark.slow
def test_two_images_are_learned_by_heart():
    model = tiny_detector(nano(patch_size=8))
    images = [torch.zeros(3, 64, 64), torch.zeros(3, 64, 48)]
    images[0][:, 8:40, 8:40] = 1
    images[1][0, 8:40, 8:40] = -1
    given = targets()
    given[1] = {name: values[:1] for name, values in given[1].items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(model(images, given).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
    for found, target in zip(model.eval()(images), given):
        assert found["labels"][0] == target["labels"][0]
        torch.testing.assert_close(found["boxes"][0], target["boxes"][0], atol=4, rtol=0)
        mask, truth = found["masks"][0, 0] > 0.5, target["masks"][0] > 0
        assert (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_images_are_padded_and_neither_resized_nor_normalised():
    images = [torch.randn(3, 30, 50), torch.randn(3, 20, 70)]
    batch, _ = PadImages(32)(images)
    assert batch.tensors.shape == (2, 3, 32, 96)
    assert batch.image_sizes == [(30, 50), (20, 70)]
    for image, padded in zip(images, batch.tensors):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
        assert not padded[:, height:].any() and not padded[:, :, width:].any()
    batch, _ = PadImages(32, (64, 64))(images)
    assert batch.tensors.shape == (2, 3, 64, 96)


def test_masks_are_pasted_where_their_boxes_are():
    masks, boxes = torch.ones(1, 1, 28, 28), torch.tensor([[8, 4, 24, 12.0]])
    [found] = (
        PadImages(32).eval().postprocess([{"masks": masks, "boxes": boxes}], [(32, 32)], [(20, 30)])
    )
    assert found["masks"].shape == (1, 1, 20, 30)
    assert (found["masks"][0, 0, 5:11, 9:23] > 0.5).all()
    assert not found["masks"][0, 0, 14:].any() and not found["masks"][0, 0, :, 26:].any()


def test_timm_encoders_need_images_of_a_fixed_size():
    encoder = timm_encoder("vit_tiny_patch16_224", image_size=(64, 64), depth=2)
    model = tiny_detector(encoder, masks=False, fixed_size=True).eval()
    assert len(model([torch.randn(3, 40, 64)])) == 1
    encoder = timm_encoder("vit_tiny_patch16_224", image_size=(64, 64), depth=2)
    with pytest.raises(hpm.UserError, match="was built for"):
        tiny_detector(encoder, masks=False).eval()([torch.randn(3, 40, 96)])


def test_encoders_that_do_not_fit():
    with pytest.raises(hpm.UserError, match="patches of 4, 8, 16 or 32"):
        DetectorBackbone(nano((56, 56), 14))
    with pytest.raises(hpm.UserError, match="hpm's own encoders"):
        build_detector(
            timm_encoder("vit_tiny_patch16_224", image_size=(64, 64), depth=1), 2, window_size=2
        )


def test_layer_decay_of_a_detector():
    model = tiny_detector()
    group = {p: g for g in layer_decay_groups(model, 1e-3, 0.7, 0.1) for p in g["params"]}
    assert len(group) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        scale = 1.0
        if name.startswith("backbone.encoder.blocks."):
            scale = 0.7 ** (4 - int(name.split(".")[3]))
        elif name.startswith("backbone.encoder."):
            scale = 0.7**5
        assert group[parameter]["lr_scale"] == scale, name

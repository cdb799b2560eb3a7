"""Mask R-CNN and Faster R-CNN on a plain Vision Transformer (ViTDet, Li et al. 2022, arXiv
2203.16527)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.models.encoder import Encoder
from hpm.models.pyramid import STRIDES, LayerNorm2d, doublings, rescaling
from hpm.models.vit import VisionTransformer

ANCHOR_SIZES = (32, 64, 128, 256, 512)  # pixels, one for each level
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16, 32 and 64 from the last map of an encoder (ViTDet, section 3).

    The map is rescaled by transposed convolutions or max-pooling, followed by a 1x1 and a 3x3
    convolution per level, each with a layer norm over the channels. The coarsest level subsamples
    the one before.

    Args:
        dim: channels of the encoder's map.
        channels: channels of each level.
        times: number of times the map is doubled in size for each of the first four levels;
            negative for halving (see `doublings`).
    """

    def __init__(self, dim: int, channels: int, times: Sequence[int]):
        super().__init__()
        self.levels = nn.ModuleList()
        for n in times:
            widths = [dim // 2**step for step in range(max(n, 0) + 1)]
            self.levels.append(
                nn.Sequential(
                    rescaling(n, widths, LayerNorm2d),
                    nn.Conv2d(widths[-1], channels, 1, bias=False),
                    LayerNorm2d(channels),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    LayerNorm2d(channels),
                )
            )

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"]
    ) -> OrderedDict[str, Float[Tensor, "batch channels _ _"]]:
        """The levels, finest first, under torchvision's names: "0" to "3", and "pool"."""
        maps = OrderedDict((str(number), level(x)) for number, level in enumerate(self.levels))
        maps["pool"] = F.max_pool2d(maps[str(len(maps) - 1)], 1, stride=2)
        return maps


class DetectorBackbone(nn.Module):
    """An encoder and its feature pyramid, as a backbone for torchvision's detectors.

    The encoder's final norm is removed, and position embeddings are trained. Raises UserError
    unless patches are square with a power of 2 as side.
    """

    def __init__(self, encoder: Encoder, channels: int = 256):
        super().__init__()
        times = doublings(encoder)
        if encoder.patch_size[0] & (encoder.patch_size[0] - 1):
            raise UserError(
                f"detection needs patches of 4, 8, 16 or 32 pixels, not {encoder.patch_size[0]}: "
                "no map would have the strides that the anchors stand on"
            )
        self.encoder = encoder
        self.pyramid = SimpleFeaturePyramid(encoder.embed_dim, channels, times)
        self.out_channels = channels
        encoder.norm = nn.Identity()
        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(True)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> OrderedDict[str, Float[Tensor, "batch dim _ _"]]:
        """Maps of strides 4 to 64, in float32 even under autocast, because anchors take the dtype
        of the maps."""
        (last,) = self.encoder.feature_maps(images, [len(self.encoder.blocks) - 1])
        return OrderedDict((name, x.float()) for name, x in self.pyramid(last).items())


class PadImages(nn.Module):
    """Replaces the transform of torchvision's detectors, without resizing and normalisation.

    Images are zero-padded at the bottom and right to the size of the largest, at least `minimum`,
    rounded up to a multiple of `multiple` pixels. Predicted masks are pasted into the images, or,
    if `paste_masks` is False, returned as predicted, [N 1 28 28] within their boxes.
    """

    paste_masks = True

    def __init__(self, multiple: int, minimum: Sequence[int] = (1, 1)):
        super().__init__()
        self.multiple = multiple
        self.minimum = tuple(minimum)

    def forward(
        self,
        images: Sequence[Float[Tensor, "channels _ _"]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[Any, list[dict[str, Tensor]] | None]:
        """Pad images to torchvision's ImageList; targets are returned unchanged."""
        image_list = need("torchvision.models.detection.image_list", "finetune", "detection")
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (
            -(-max(least, *sides) // self.multiple) * self.multiple
            for least, sides in zip(self.minimum, zip(*sizes, strict=True), strict=True)
        )
        padded = [
            F.pad(image, (0, width - w, 0, height - h))
            for image, (h, w) in zip(images, sizes, strict=True)
        ]
        return image_list.ImageList(torch.stack(padded), sizes), targets

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Paste the masks of boxes [N 1 28 28] into masks of images [N 1 H W]."""
        roi_heads = need("torchvision.models.detection.roi_heads", "finetune", "detection")
        if self.training or not self.paste_masks:
            return result
        for found, size in zip(result, original_image_sizes, strict=True):
            if "masks" in found:
                found["masks"] = roi_heads.paste_masks_in_image(
                    found["masks"], found["boxes"], size
                )
        return result


def build_detector(
    encoder: Encoder,
    num_classes: int,
    masks: bool = True,
    channels: int = 256,
    window_size: int | None = None,
    fixed_size: bool = False,
    anchor_sizes: Sequence[float] = ANCHOR_SIZES,
    **options: Any,
) -> nn.Module:
    """torchvision's Mask R-CNN (Faster R-CNN without `masks`) on an encoder, with ViTDet's heads.

    In training it takes a list of images [C H W], of any sizes, and a list of targets (`boxes`
    [N 4] as x0 y0 x1 y1 in pixels, `labels` [N] from 1, `masks` [N H W]) and returns its losses by
    name. Otherwise it takes images and returns, for each, `boxes`, `labels`, `scores` and `masks`
    [N 1 H W] of probabilities. Images must be normalised; they are not resized.

    The images of a batch are padded to one size, and attention includes the padding, as in ViTDet.

    Args:
        encoder: a plain ViT, with its own stochastic depth.
        num_classes: without the background, which is class 0.
        masks: predict masks as well as boxes.
        channels: of the pyramid and of the convolutions of the heads.
        window_size: side, in patches, of the windows of all blocks but the last of every quarter
            (see VisionTransformer). Default: the encoder's own setting.
        fixed_size: pad all images to the encoder's `image_size` (if they are not larger), as
            ViTDet does, so that positions stay the same. timm's encoders need it.
        anchor_sizes: in pixels, one for each of the strides 4, 8, 16, 32 and 64.
        options: further arguments of torchvision's class.

    Raises:
        UserError: unless the encoder has square patches with a power of 2 as side, and, for
            `window_size`, window attention.
    """
    job = "detection"
    faster_rcnn = need("torchvision.models.detection.faster_rcnn", "finetune", job)
    mask_rcnn = need("torchvision.models.detection.mask_rcnn", "finetune", job)
    rpn = need("torchvision.models.detection.rpn", "finetune", job)
    if window_size is not None:
        if not isinstance(encoder, VisionTransformer):
            raise UserError("window attention needs one of hpm's own encoders, such as vit_base")
        encoder.window_size = window_size
    backbone = DetectorBackbone(encoder, channels)
    anchors = rpn.AnchorGenerator(
        tuple((size,) for size in anchor_sizes), (ASPECT_RATIOS,) * len(anchor_sizes)
    )
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": rpn.RPNHead(channels, len(ASPECT_RATIOS), conv_depth=2),
        "box_head": faster_rcnn.FastRCNNConvFCHead(
            (channels, 7, 7), [channels] * 4, [1024], norm_layer=LayerNorm2d
        ),
        "box_predictor": faster_rcnn.FastRCNNPredictor(1024, num_classes + 1),
    }
    kind = faster_rcnn.FasterRCNN
    if masks:
        kind = mask_rcnn.MaskRCNN
        parts["mask_head"] = mask_rcnn.MaskRCNNHeads(
            channels, [channels] * 4, 1, norm_layer=LayerNorm2d
        )
        parts["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(channels, channels, num_classes + 1)
    model = kind(backbone, **parts, **options)
    model.transform = PadImages(
        max(STRIDES[-1], encoder.patch_size[0]), encoder.image_size if fixed_size else (1, 1)
    )
    # bfloat16 would round the coordinates of boxes to several pixels.
    heads = model.roi_heads
    for part in (model.rpn.head, heads.box_predictor, *([heads.mask_predictor] if masks else [])):
        part.register_forward_hook(_float32_hook)
    return model


def _float32_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that converts the output to float32."""
    return _to_float32(output)


def _to_float32(output: Any) -> Any:
    """Convert a tensor, or nested lists and tuples of tensors, to float32."""
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float32(part) for part in output)

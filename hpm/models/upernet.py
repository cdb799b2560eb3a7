"""The head of UPerNet (Xiao et al. 2018, arXiv 1807.10221) and its auxiliary FCN head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.models.pyramid import NormLayer

POOLED_SIZES = (1, 2, 3, 6)
CLASSIFIER_STD = 0.01


def resize(
    x: Float[Tensor, "batch dim rows columns"], size: Sequence[int]
) -> Float[Tensor, "batch dim new_rows new_columns"]:
    """Bilinear resampling of maps."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class ConvNormRelu(nn.Sequential):
    """A convolution with padding, a norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, norm_layer: NormLayer):
        convolution = nn.Conv2d(
            inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False
        )  # the norm has a bias
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, norm_layer(outputs), nn.ReLU(inplace=True))


class PixelClassifier(nn.Sequential):
    """Channel dropout and a 1x1 convolution."""

    def __init__(self, dim: int, num_classes: int, dropout: float = 0.1):
        linear = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(linear.weight, std=CLASSIFIER_STD)
        assert linear.bias is not None
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Dropout2d(dropout), linear)


class PyramidPooling(nn.Module):
    """Pyramid pooling (Zhao et al. 2017, arXiv 1612.01105): concatenates a map with its averages
    over 1, 2, 3 and 6 cells per side, and fuses them with a 3x3 convolution."""

    def __init__(self, dim: int, channels: int, norm_layer: NormLayer):
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormRelu(dim, channels, 1, norm_layer))
            for size in POOLED_SIZES
        )
        self.fuse = ConvNormRelu(dim + len(POOLED_SIZES) * channels, channels, 3, norm_layer)

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        pooled = [resize(pool(x), x.shape[2:]) for pool in self.pooled]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class UPerNetHead(nn.Module):
    """Class logits at the finest stride from a pyramid of maps, ordered from fine to coarse.

    The coarsest map goes through pyramid pooling and is added top-down to the finer ones (1x1
    lateral, then 3x3 convolutions). All levels are resized to the finest and fused.

    Args:
        dim: channels of every input map.
        channels: of all maps inside the head.
        num_classes: number of classes.
        levels: number of maps.
        norm_layer: called with the number of channels.
        dropout: rate before the classifier.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        num_classes: int,
        levels: int = 4,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ):
        super().__init__()
        finer = range(levels - 1)
        self.pooling = PyramidPooling(dim, channels, norm_layer)
        self.lateral = nn.ModuleList(ConvNormRelu(dim, channels, 1, norm_layer) for _ in finer)
        self.smooth = nn.ModuleList(ConvNormRelu(channels, channels, 3, norm_layer) for _ in finer)
        self.fuse = ConvNormRelu(levels * channels, channels, 3, norm_layer)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(
        self, maps: list[Float[Tensor, "batch dim _ _"]]
    ) -> Float[Tensor, "batch classes rows columns"]:
        return self.classifier(self.fused(maps))

    def fused(
        self, maps: list[Float[Tensor, "batch dim _ _"]]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """The input of the classifier."""
        *finer, coarsest = maps
        level = self.pooling(coarsest)
        levels = [level]
        for x, lateral, smooth in reversed(
            list(zip(finer, self.lateral, self.smooth, strict=True))
        ):
            side = lateral(x)
            level = side + resize(level, side.shape[2:])
            levels.append(smooth(level))
        finest = levels[-1].shape[2:]
        return self.fuse(torch.cat([resize(x, finest) for x in reversed(levels)], dim=1))


class FCNHead(nn.Sequential):
    """A 3x3 convolution and a classifier (FCN; Long et al. 2015, arXiv 1411.4038)."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        channels: int = 256,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ):
        super().__init__(
            ConvNormRelu(dim, channels, 3, norm_layer),
            PixelClassifier(channels, num_classes, dropout),
        )

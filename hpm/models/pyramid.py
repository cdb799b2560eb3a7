"""Feature maps of several strides from a plain Vision Transformer, whose maps have one stride."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError
from hpm.models.encoder import Encoder
from hpm.models.vit import LAYER_NORM_EPS, quarter_ends

STRIDES = (4, 8, 16, 32)

NormLayer = Callable[[int], nn.Module]  # number of channels -> norm of maps [B C H W]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of maps [B C H W]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, input: Float[Tensor, "batch dim rows columns"]) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def blocks_to_read(depth: int) -> list[int]:
    """0-based indices of the four blocks whose maps a segmentation head reads.

    3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, as in BEiT (Bao et al. 2022, arXiv 2106.08254) and
    MAE for ADE20K; otherwise the last block of each quarter. Indices repeat for encoders of fewer
    than four blocks.
    """
    if depth in (12, 24):
        return [depth // 3 - 1, depth // 2 - 1, depth * 2 // 3 - 1, depth - 1]
    return quarter_ends(depth)


def doublings(encoder: Encoder) -> list[int]:
    """Number of times an encoder's map must be doubled in size for each of the strides 4, 8, 16 and
    32; negative for halving. The patch size is rounded to a power of 2.

    Raises UserError if patches are not square.
    """
    if len(encoder.patch_size) != 2 or encoder.patch_size[0] != encoder.patch_size[1]:
        raise UserError(
            f"dense prediction needs square patches, not {encoder.patch_size}: take a backbone "
            "pre-trained on images with such patches"
        )
    patch = round(log2(encoder.patch_size[0]))
    return [patch - round(log2(stride)) for stride in STRIDES]


def rescaling(times: int, widths: Sequence[int], norm_layer: NormLayer) -> nn.Sequential:
    """Layers that double maps [B widths[0] h w] in size `times` times by transposed convolutions,
    with a norm and a GELU in between; for times < 0, that halve them by max-pooling.

    `widths`: channels before and after each convolution. Halving rounds up.
    """
    layers: list[nn.Module] = []
    for number in range(times):
        if number:
            layers += [norm_layer(widths[number]), nn.GELU()]
        layers.append(nn.ConvTranspose2d(widths[number], widths[number + 1], 2, stride=2))
    if times < 0:
        layers.append(nn.MaxPool2d(2**-times, ceil_mode=True))
    return nn.Sequential(*layers)

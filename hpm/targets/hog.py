"""Target: histograms of oriented gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hpm.core.config import PretrainConfig
from hpm.mining.losses import squared_error
from hpm.models.patches import patchify
from hpm.targets.base import Images, Patches, PatchLoss, Target, TargetInputs

HOG_BINS = 9

HOG_CELL = 8  # pixels


class HogTarget(Target):
    """Histograms of oriented gradients (MaskFeat): nine directions for each channel, in cells of 8
    pixels (or one cell per patch if 8 does not divide it), normalised to unit length. Those of a
    clip are of every frame."""

    def __init__(self, patch_size: tuple[int, ...], channels: int):
        *frames, height, width = patch_size
        sides = [HOG_CELL if size % HOG_CELL == 0 else size for size in (height, width)]
        self.cells = (*(1 for _ in frames), *sides)  # of each frame
        # Cells per patch along each axis.
        self.per_patch = tuple(p // c for p, c in zip(patch_size, self.cells, strict=True))
        self.dim = math.prod(self.per_patch) * channels * HOG_BINS

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> HogTarget:
        return cls(inputs.patch_size, inputs.channels)

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        height, width = self.cells[-2:]
        if images.ndim == 4:
            return patchify(hog(images, (height, width)), self.per_patch)
        frames = images.transpose(1, 2)
        found = hog(frames.flatten(0, 1), (height, width))
        return patchify(found.unflatten(0, frames.shape[:2]).transpose(1, 2), self.per_patch)

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return squared_error(prediction, target)


def hog(
    images: Float[Tensor, "batch channels height width"], cell: tuple[int, int]
) -> Float[Tensor, "batch values rows columns"]:
    """Histograms of oriented gradients of every cell and channel (Dalal and Triggs 2005).

    Central differences (zero at the border), unsigned directions in nine bins, weighted by gradient
    magnitude, without interpolation between bins. Each histogram has L2 norm 1.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // cell[0], width // cell[1]
    images = images.float()
    dy, dx = torch.zeros_like(images), torch.zeros_like(images)
    dy[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    dx[..., 1:-1] = images[..., 2:] - images[..., :-2]
    angle = torch.atan2(dy, dx) / math.pi % 1.0
    bins = (angle * HOG_BINS).long().clamp(max=HOG_BINS - 1)
    y = torch.arange(height, device=images.device) // cell[0]
    x = torch.arange(width, device=images.device) // cell[1]
    place = (y[:, None] * columns + x) * HOG_BINS + bins
    histograms = images.new_zeros(batch, channels, rows * columns * HOG_BINS)
    histograms.scatter_add_(2, place.flatten(2), torch.hypot(dy, dx).flatten(2))
    histograms = histograms.view(batch, channels, rows, columns, HOG_BINS) / math.prod(cell)
    histograms = histograms / (histograms.square().sum(-1, keepdim=True) + 1e-10).sqrt()
    return histograms.permute(0, 1, 4, 2, 3).flatten(1, 2)

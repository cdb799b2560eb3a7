"""Tokens of a codebook."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from hpm.mining.losses import token_cross_entropy
from hpm.targets.base import Images, Patches, PatchLoss, _RankedByLoss
from hpm.targets.tokens import Codebook


class TokenTarget(_RankedByLoss):
    """The number of the nearest code of a codebook (as BEiT), told by cross-entropy."""

    def __init__(self, codebook: Codebook, mean: Tensor, std: Tensor, grid: tuple[int, ...]):
        self.codebook, self.dim, self.grid = codebook, len(codebook.codes), grid
        self.mean, self.std = mean, std

    def __call__(
        self, images: Images, features: Tensor | None = None
    ) -> Int[Tensor, "batch patches 1"]:
        pixels = images * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        vectors = self.codebook.vectors(pixels, self.grid)
        # In full precision: rounded distances would often name another code.
        with torch.autocast(images.device.type, enabled=False):
            return self.codebook.nearest(vectors)[..., None]

    def patch_loss(self, prediction: Patches, target: Int[Tensor, "batch patches 1"]) -> PatchLoss:
        return token_cross_entropy(prediction, target[..., 0])

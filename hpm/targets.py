"""What the reconstructor has to predict for each patch."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hpm.models.patches import patchify

Target = Literal["pixels", "normalized_pixels"]
Patches = Float[Tensor, "batch patches values"]

EPS = 1e-6


def pixel_target(
    images: Float[Tensor, "batch channels *size"], patch_size: tuple[int, ...], target: Target
) -> Patches:
    """Pixels of every patch, or pixels standardised within their patch (unbiased variance)."""
    patches = patchify(images, patch_size)
    if target == "pixels":
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def patch_statistics(patches: Patches) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B N 1] of each patch, by which normalised pixels are undone."""
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True)
    return mean, (variance + EPS).sqrt()

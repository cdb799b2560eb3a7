"""Geometry of patches: grid, patchify and positions, for any number of spatial dimensions.

An image is [B C H W]; with a frame axis in front of H the same functions cut tubes out of a video.
Patches are numbered in raster order; inside a patch the order is row, column, channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, ...]


def grid_size(image_size: Sequence[int], patch_size: Sequence[int]) -> Size:
    """Number of patches along each axis. Raises ValueError if they do not divide the image."""
    if len(image_size) != len(patch_size):
        raise ValueError(f"image size {image_size} and patch size {patch_size} differ in length")
    for image, patch in zip(image_size, patch_size, strict=True):
        if patch < 1 or image % patch:
            raise ValueError(f"a patch of {patch} does not divide an image of {image} pixels")
    return tuple(i // p for i, p in zip(image_size, patch_size, strict=True))


def patchify(
    images: Float[Tensor, "batch channels *size"], patch_size: Size
) -> Float[Tensor, "batch patches values"]:
    """Cut images into patches, each flattened as (row, column, channel)."""
    batch, channels, *size = images.shape
    grid = grid_size(size, patch_size)
    axes = len(grid)
    split = [n for pair in zip(grid, patch_size, strict=True) for n in pair]
    cut = images.reshape(batch, channels, *split)
    grid_axes = [2 + 2 * a for a in range(axes)]
    patch_axes = [3 + 2 * a for a in range(axes)]
    cut = cut.permute(0, *grid_axes, *patch_axes, 1)
    return cut.reshape(batch, prod(grid), prod(patch_size) * channels)


def unpatchify(
    patches: Float[Tensor, "batch patches values"], grid: Size, patch_size: Size
) -> Float[Tensor, "batch channels *size"]:
    """The inverse of `patchify`."""
    batch, _, values = patches.shape
    axes = len(grid)
    channels = values // prod(patch_size)
    cut = patches.reshape(batch, *grid, *patch_size, channels)
    order = [axis for a in range(axes) for axis in (1 + a, 1 + axes + a)]
    cut = cut.permute(0, 1 + 2 * axes, *order)
    size = [g * p for g, p in zip(grid, patch_size, strict=True)]
    return cut.reshape(batch, channels, *size)


def gather_patches(values: Tensor, ids: Tensor) -> Tensor:
    """Take `values [B N ...]` at `ids [B K]`: [B K ...]."""
    index = ids.reshape(*ids.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def interpolate_positions(
    positions: Float[Tensor, "1 tokens dim"], grid: Size, new_grid: Size
) -> Float[Tensor, "1 new_tokens dim"]:
    """Interpolate the positions of a 2-D grid of patches to another grid (bicubic).

    The position of the class token, which comes first, is kept. For fine-tuning at another image
    size (Dosovitskiy et al. 2021, 3.2).
    """
    if grid == new_grid:
        return positions
    dim = positions.shape[-1]
    cls_token, patches = positions[:, :1], positions[:, 1:]
    patches = patches.reshape(1, *grid, dim).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_token, patches.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)


def resample_projection(
    weight: Float[Tensor, "dim channels height width"], patch_size: Size
) -> Float[Tensor, "dim channels new_height new_width"]:
    """Resize a patch projection to patches of another size.

    The result is the least-squares solution such that a resized (bicubic) patch gives the token of
    the original patch (FlexiViT, Beyer et al. 2023, arXiv 2212.08013, section 3.4). Interpolating
    the weights like an image would change the scale of the tokens.
    """
    before = tuple(weight.shape[2:])
    if before == patch_size:
        return weight
    pixels = prod(before)
    basis = torch.eye(pixels, dtype=torch.float64).reshape(pixels, 1, *before)
    resized = F.interpolate(basis, patch_size, mode="bicubic", align_corners=False, antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1))  # [new pixels, pixels]
    new = weight.double().flatten(2) @ inverse.T
    return new.reshape(*weight.shape[:2], *patch_size).to(weight.dtype)


def sincos_positions(grid: Size, dim: int) -> Float[Tensor, "tokens dim"]:
    """Fixed sine-cosine positions of a class token (zeros) and of every patch, in raster order.

    The channels are divided equally among the axes, the last axis (columns) first. Each part holds
    sines, then cosines, of the coordinate at frequencies from 1 to 1 / 10000 (Vaswani et al. 2017;
    laid out as in MAE). Computed in float64.
    """
    if dim % (2 * len(grid)):
        raise ValueError(f"dimension {dim} cannot be shared by {len(grid)} axes of sines, cosines")
    share = dim // len(grid)
    frequencies = 10000.0 ** -(torch.arange(share // 2, dtype=torch.float64) / (share // 2))
    coordinates = torch.meshgrid(
        *[torch.arange(g, dtype=torch.float64) for g in grid], indexing="ij"
    )
    columns = []
    for coordinate in reversed(coordinates):
        angle = coordinate.reshape(-1, 1) * frequencies
        columns += [angle.sin(), angle.cos()]
    positions = torch.cat(columns, dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), positions]).float()

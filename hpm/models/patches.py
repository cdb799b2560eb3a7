"""Geometry of patches: grid, patchify and positions, for any number of axes.

Images are [B C H W], clips of a video [B C T H W]; the patches of a clip are tubes of several
frames. Patches are numbered in raster order; inside a patch the order is (frame,) row, column,
channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Interpolate the positions of a grid of patches to another grid: rows and columns bicubic,
    times linear. An image is a clip of one time.

    The positions of prefix tokens, which come first, are kept. For fine-tuning at another image
    size (Dosovitskiy et al. 2021, 3.2).
    """
    if grid == new_grid:
        return positions
    dim, count = positions.shape[-1], prod(grid)
    prefix, patches = positions[:, :-count], positions[:, -count:]
    maps = patches.reshape(-1, *grid[-2:], dim).permute(0, 3, 1, 2)  # one for each time
    if grid[-2:] != new_grid[-2:]:
        maps = F.interpolate(maps, new_grid[-2:], mode="bicubic", align_corners=False)
    if len(maps) != prod(new_grid[:-2]):
        over_time = maps.flatten(1).T[None]
        over_time = F.interpolate(over_time, prod(new_grid[:-2]), mode="linear")
        maps = over_time[0].T.reshape(-1, *maps.shape[1:])
    return torch.cat([prefix, maps.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)


def resample_projection(
    weight: Float[Tensor, "dim channels *size"], patch_size: Size
) -> Float[Tensor, "dim channels *new_size"]:
    """Resize a patch projection to patches of another size, or of more frames.

    The result is the least-squares solution such that a resized patch (rows and columns bicubic,
    frames linear) gives the token of the original patch (FlexiViT, Beyer et al. 2023, arXiv
    2212.08013, section 3.4). Interpolating the weights like an image would change the scale of the
    tokens. From an image's patch to a tube, which is a patch repeated over its frames, the weights
    are copied to every frame and divided by the number of frames (I3D, Carreira and Zisserman 2017,
    arXiv 1705.07750, section 2.1).
    """
    before = tuple(weight.shape[2:])
    if before == patch_size:
        return weight
    new = weight.double()
    if len(patch_size) > len(before):
        new = new.unsqueeze(2)
    if new.shape[-2:] != patch_size[-2:]:
        side = tuple(new.shape[-2:])
        basis = torch.eye(prod(side), dtype=torch.float64).reshape(-1, 1, *side)
        resized = F.interpolate(
            basis, patch_size[-2:], mode="bicubic", align_corners=False, antialias=True
        )
        inverse = torch.linalg.pinv(resized.flatten(1))  # [new pixels, pixels]
        new = (new.flatten(-2) @ inverse.T).unflatten(-1, patch_size[-2:])
    if new.shape[2:] != patch_size:
        frames = torch.eye(new.shape[2], dtype=torch.float64)[:, None]
        resized = F.interpolate(frames, patch_size[0], mode="linear")
        inverse = torch.linalg.pinv(resized.flatten(1))  # [new frames, frames]
        new = (new.movedim(2, -1) @ inverse.T).movedim(-1, 2)
    return new.to(weight.dtype).contiguous()


def sincos_positions(grid: Size, dim: int) -> Float[Tensor, "tokens dim"]:
    """Fixed sine-cosine positions of a class token (zeros) and of every patch, in raster order.

    The pairs of a sine and a cosine are divided equally among the axes, the last axis (columns)
    first; the first axis (times, in a clip) also takes those left over. Each part holds sines, then
    cosines, of the coordinate at frequencies from 1 to 1 / 10000 (Vaswani et al. 2017; laid out as
    in MAE). Computed in float64.
    """
    pairs, axes = dim // 2, len(grid)
    if dim % 2 or pairs < axes:
        raise ValueError(f"dimension {dim} cannot be shared by {axes} axes of sines, cosines")
    shares = [pairs - (axes - 1) * (pairs // axes)] + [pairs // axes] * (axes - 1)
    coordinates = torch.meshgrid(
        *[torch.arange(g, dtype=torch.float64) for g in grid], indexing="ij"
    )
    columns = []
    for share, coordinate in zip(reversed(shares), reversed(coordinates), strict=True):
        frequencies = 10000.0 ** -(torch.arange(share, dtype=torch.float64) / share)
        angle = coordinate.reshape(-1, 1) * frequencies
        columns += [angle.sin(), angle.cos()]
    positions = torch.cat(columns, dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), positions]).float()


def sincos_1d_positions(grid: Size, dim: int) -> Float[Tensor, "tokens dim"]:
    """Fixed sine-cosine positions of a class token (zeros) and of every patch by its number, as in
    VideoMAE: sines and cosines take turns. Computed in float64."""
    numbers = torch.arange(prod(grid), dtype=torch.float64)[:, None]
    channels = torch.arange(dim)
    angle = numbers / 10000.0 ** (2 * (channels // 2).double() / dim)
    positions = torch.where(channels % 2 == 0, angle.sin(), angle.cos())
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), positions]).float()


# The fixed positions of `--positions`: (grid, dim) -> [1 + patches, dim], a class token's first.
POSITIONS: dict[str, Callable[[Size, int], Float[Tensor, "tokens dim"]]] = {
    "sincos": sincos_positions,
    "sincos_1d": sincos_1d_positions,
}

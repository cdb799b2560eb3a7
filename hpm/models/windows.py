"""Window attention on a grid of patches with any number of axes."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hpm.models.patches import Size, patchify, unpatchify


class Windows(NamedTuple):
    """A grid of patches, divided into windows of `size` patches along each axis."""

    grid: Size
    size: int


def window_attention(
    q: Float[Tensor, "batch heads tokens size"],
    k: Float[Tensor, "batch heads tokens size"],
    v: Float[Tensor, "batch heads tokens size"],
    windows: Windows,
) -> Float[Tensor, "batch heads tokens size"]:
    """Patches attend to their window and to the prefix tokens; prefix tokens attend to all tokens
    (after ViTDet, Li et al. 2022, arXiv 2203.16527, section 3).

    If the grid is not a multiple of the window, the last windows are padded, and the padding is
    masked out. With a single window this is global attention.
    """
    grid = windows.grid
    prefix = q.shape[2] - prod(grid)
    window = tuple(min(windows.size, side) for side in grid)
    queries, keys, values = (_cut(x[:, :, prefix:], grid, window) for x in (q, k, v))
    count = len(queries) // len(q)
    keys, values = (
        torch.cat([x[:, :, :prefix].repeat_interleave(count, 0), cut], dim=2)
        for x, cut in ((k, keys), (v, values))
    )
    mask = _not_padding(grid, window, prefix, q.device)
    if mask is not None:
        mask = mask.repeat(len(q), 1, 1, 1)
    patches = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    patches = _join(patches, grid, window, len(q))
    if prefix == 0:
        return patches
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    return torch.cat([first, patches], dim=2)


def _cut(
    x: Float[Tensor, "batch heads patches size"], grid: Size, window: Size
) -> Float[Tensor, "batch_windows heads inside size"]:
    """Cut patches into a batch of zero-padded windows, ordered by sample."""
    heads, size = x.shape[1], x.shape[3]
    maps = x.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    cut = patchify(F.pad(maps, _padding(grid, window)), window)
    return cut.reshape(-1, prod(window), heads, size).transpose(1, 2)


def _join(
    x: Float[Tensor, "batch_windows heads inside size"], grid: Size, window: Size, batch: int
) -> Float[Tensor, "batch heads patches size"]:
    """The inverse of `_cut`; drops the padding."""
    heads = x.shape[1]
    counts = tuple(-(-side // w) for side, w in zip(grid, window, strict=True))
    cut = x.transpose(1, 2).reshape(batch, prod(counts), -1)
    maps = unpatchify(cut, counts, window)
    for axis, side in enumerate(grid, 2):
        maps = maps.narrow(axis, 0, side)
    return maps.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def _padding(grid: Size, window: Size) -> list[int]:
    """Padding at the end of each axis, in the order of F.pad (last axis first)."""
    missing = [-side % w for side, w in zip(grid, window, strict=True)]
    return [n for behind in reversed(missing) for n in (0, behind)]


def _not_padding(
    grid: Size, window: Size, prefix: int, device: torch.device
) -> Bool[Tensor, "windows 1 1 keys"] | None:
    """True for the keys of each window that are not padding; None without padding."""
    padding = _padding(grid, window)
    if not any(padding):
        return None
    inside = F.pad(torch.ones(1, 1, *grid, device=device), padding)
    return F.pad(patchify(inside, window)[0], (prefix, 0), value=1.0).bool()[:, None, None]

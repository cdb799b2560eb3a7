"""Units of several patches along each axis, which are mined and hidden together."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def unit_grid(grid: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Number of units along each axis. Raises ValueError if units do not divide the grid."""
    if any(size % unit for size in grid):
        raise ValueError(f"units of {unit} patches along each axis do not divide a grid of {grid}")
    return tuple(size // unit for size in grid)


def unit_of_patches(
    grid: tuple[int, ...], unit: int, device: torch.device | None = None
) -> Int[Tensor, " patches"]:
    """Index of each patch's unit. Units and patches are in raster order."""
    units = unit_grid(grid, unit)
    found = torch.arange(math.prod(units), device=device).view(units)
    for axis in range(len(grid)):
        found = found.repeat_interleave(unit, dim=axis)
    return found.flatten()


def mean_of_units(
    values: Float[Tensor, "batch patches"], grid: tuple[int, ...], unit: int
) -> Float[Tensor, "batch units"]:
    """Mean over the patches of each unit."""
    split = [length for size in unit_grid(grid, unit) for length in (size, unit)]
    within = [2 + 2 * axis for axis in range(len(grid))]
    return values.reshape(-1, *split).mean(within).flatten(1)


def unit_by_unit(
    priority: Float[Tensor, "batch units"],
    noise: Float[Tensor, "batch patches"],
    grid: tuple[int, ...],
    unit: int,
) -> Float[Tensor, "batch patches"]:
    """Priority of each patch: first by its unit, within a unit by noise in [0, 1).

    Hiding the top M patches then hides whole units. If M is not a multiple of a unit's size, the
    last unit is hidden in part.
    """
    rank = priority.argsort(dim=1, descending=True).argsort(dim=1)  # 0 is hidden first
    # Half the noise, so that rounding never reaches the next rank.
    return 0.5 * noise - rank[:, unit_of_patches(grid, unit, priority.device)]

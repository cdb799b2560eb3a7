"""Random mask strategies: each gives every patch of a batch a priority to be hidden."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hpm.core.choices import HARD_SHARES
from hpm.core.errors import UserError, one_line
from hpm.core.plugins import find_plugin
from hpm.mining.draw import BLOCKS, Draw, Priority
from hpm.mining.units import unit_of_patches


def random(draw: Draw, grid: tuple[int, ...], num_hidden: int) -> Priority:
    """Independent random patches (MAE)."""
    return draw.noise(math.prod(grid))


def block(draw: Draw, grid: tuple[int, ...], num_hidden: int) -> Priority:
    """One square block."""
    place = draw.noise(len(grid), BLOCKS)
    return one_block(random(draw, grid, num_hidden), place, grid, num_hidden)


def multi_block(draw: Draw, grid: tuple[int, ...], num_hidden: int) -> Priority:
    """Blocks of random size and shape (BEiT)."""
    choices = draw.noise(4 * MAX_BLOCKS, BLOCKS).view(-1, MAX_BLOCKS, 4)
    return many_blocks(random(draw, grid, num_hidden), choices, grid)


def tube(draw: Draw, grid: tuple[int, ...], num_hidden: int) -> Priority:
    """Random places, hidden at all times of a clip (VideoMAE)."""
    return random(draw, grid, num_hidden)


def uniform(draw: Draw, grid: tuple[int, ...], num_hidden: int) -> Priority:
    """All but one patch of each 2 x 2 (UM-MAE); of each 2 x 2 x 2 in clips."""
    return one_visible_per_cell(random(draw, grid, num_hidden), grid)


def coloured_noise(draw: Draw, grid: tuple[int, ...], num_hidden: int, colour: str) -> Priority:
    """Blobs whose size depends on the colour (ColorMAE)."""
    return filtered_noise(random(draw, grid, num_hidden), grid, colour)


def one_block(
    priority: Priority,
    place: Float[Tensor, "batch axes"],
    grid: tuple[int, ...],
    num_hidden: int,
) -> Priority:
    """One square block within the image. Patches nearer to its centre have a higher priority.

    `place` in [0, 1) determines its position. `priority` in [0, 1) determines which of its outer
    patches stay visible if it has more than `num_hidden`. In an image that is too narrow for a
    square, the block is as wide as the image.
    """
    side = 1
    while math.prod(min(side, size) for size in grid) < num_hidden:
        side += 1
    distance = torch.zeros_like(priority)
    for axis, coordinates in enumerate(_coordinates(grid, priority.device)):
        width = min(side, grid[axis])
        start = (place[:, axis] * (grid[axis] - width + 1)).floor()
        centre = start + (width - 1) / 2
        distance = torch.maximum(distance, (coordinates - centre[:, None]).abs())
    return 0.5 * priority - distance  # distances differ by 0 or at least 1


MAX_BLOCKS = 32
BLOCK_AREA = (16 / 196, 0.4)  # smallest and largest, as a share of the image
BLOCK_ASPECT = 0.3  # smallest aspect ratio; its inverse is the largest


def many_blocks(
    priority: Priority, choices: Float[Tensor, "batch blocks 4"], grid: tuple[int, ...]
) -> Priority:
    """Blocks of random size, shape and position, added until enough patches are hidden (BEiT,
    algorithm 1). A random part of the last one is hidden.

    `choices` in [0, 1): area, aspect, row, column of each block. Raises ValueError unless the grid
    has two axes.
    """
    if len(grid) != 2:
        raise ValueError("blocks are made for images")
    rows, columns = grid
    low, high = BLOCK_AREA
    area = (low + choices[..., 0] * (high - low)) * rows * columns
    aspect = ((2 * choices[..., 1] - 1) * math.log(BLOCK_ASPECT)).exp()
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top = (choices[..., 2] * (rows - height + 1)).floor()[..., None]
    left = (choices[..., 3] * (columns - width + 1)).floor()[..., None]
    y, x = _coordinates(grid, priority.device)
    inside_y = (y >= top) & (y < top + height[..., None])
    inside_x = (x >= left) & (x < left + width[..., None])
    covered = inside_y & inside_x  # [B blocks N]
    first = torch.where(covered.any(1), covered.int().argmax(1), covered.shape[1])
    return priority - first


def one_visible_per_cell(priority: Priority, grid: tuple[int, ...]) -> Priority:
    """Uniform sampling (UM-MAE): one visible patch in each cell of two patches along every axis.

    Raises ValueError if the grid is odd.
    """
    if any(size % 2 for size in grid):
        raise ValueError(f"a grid of {grid} has no cells of two along every axis")
    cell = unit_of_patches(grid, 2, priority.device)
    members = cell.argsort(stable=True).view(-1, 2 ** len(grid))  # [cells patches-of-a-cell]
    chosen = priority[:, members].argmin(-1, keepdim=True)
    visible = members.expand(len(priority), -1, -1).gather(-1, chosen).flatten(1)
    return priority.scatter(1, visible, -1.0)


# Standard deviations of the Gaussian filters, in patches.
FINE, COARSE = 1.0, 2.0


def filtered_noise(priority: Priority, grid: tuple[int, ...], colour: str) -> Priority:
    """Filtered noise (ColorMAE): red is low-pass (large blobs), blue high-pass, green band-pass
    (small blobs), purple band-stop."""
    white = (priority - 0.5).reshape(-1, *grid)
    fine, coarse = _blurred(white, FINE), _blurred(white, COARSE)
    filtered = {
        "red": fine,
        "blue": white - fine,
        "green": fine - coarse,
        "purple": white - (fine - coarse),
    }
    return filtered[colour].flatten(1)


def _blurred(values: Float[Tensor, batch * grid], sigma: float) -> Float[Tensor, batch * grid]:
    """Gaussian filter along every axis, with periodic borders, so that all patches are alike."""
    for axis in range(1, values.ndim):
        size = values.shape[axis]
        offset = torch.arange(size, device=values.device)
        apart = (offset[:, None] - offset).abs()
        weights = torch.exp(-(torch.minimum(apart, size - apart) ** 2) / (2 * sigma**2))
        weights = weights / weights.sum(1, keepdim=True)
        values = (values.movedim(axis, -1) @ weights).movedim(-1, axis)
    return values


def _coordinates(grid: tuple[int, ...], device: torch.device) -> list[Float[Tensor, " patches"]]:
    """Row, column, ... of every patch, in raster order."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    return [c.flatten() for c in torch.meshgrid(*axes, indexing="ij")]


# (random numbers of the batch, patches along each axis, number of patches to hide) -> priority of
# each patch [B N]. The patches of the highest priority are hidden.
Strategy = Callable[[Draw, tuple[int, ...], int], Priority]

STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "tube": tube,
    "block": block,
    "multi_block": multi_block,
    "uniform": uniform,
    "red_noise": partial(coloured_noise, colour="red"),
    "green_noise": partial(coloured_noise, colour="green"),
    "blue_noise": partial(coloured_noise, colour="blue"),
    "purple_noise": partial(coloured_noise, colour="purple"),
}
# Masks of the places in a clip, which are hidden at all times.
AT_ALL_TIMES = ("tube", "multi_block")
# Masks that mine, and masks that do not.
BUILT_IN = (*HARD_SHARES, *STRATEGIES)
ENTRY_POINTS = "hpm.masks"


@functools.cache
def find_mask(name: str, trusted: bool = True) -> Strategy:
    """Find the strategy of a mask that does not mine.

    Args:
        name: a built-in mask; an entry point of the group `hpm.masks` in an installed package; or
            `module:function`, for example from a file in the working directory.
        trusted: whether the name comes from the user, see `find_plugin`.

    Raises UserError if there is none, or if its import fails.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    found = find_plugin("mask", name, ENTRY_POINTS, BUILT_IN, trusted=trusted)
    if not callable(found):
        raise UserError(f"mask is '{name}': it is not a function")
    return found


def check_strategy(name: str, grid: tuple[int, ...], num_hidden: int) -> None:
    """Try a mask on a batch of two. Raises UserError if it fails or returns no priorities."""
    strategy, wanted = find_mask(name), (2, math.prod(grid))
    try:
        priority = strategy(Draw(0, 0, torch.arange(2)), grid, num_hidden)
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"mask {name} failed on a grid of {grid}: {problem}") from error
    if not isinstance(priority, Tensor) or tuple(priority.shape) != wanted:
        got = list(priority.shape) if isinstance(priority, Tensor) else type(priority).__name__
        raise UserError(
            f"mask {name} must return a priority for each patch, a tensor of shape "
            f"{list(wanted)} for 2 images, but it returns {got}"
        )

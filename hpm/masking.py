"""Which patches to hide: every strategy is a priority per patch, one function hides the top M."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Priority = Float[Tensor, "batch patches"]

Mined = Literal["easy_to_hard", "hard_to_easy", "moderate", "hardest", "easiest", "attention"]
Drawn = Literal[
    "random", "block", "multi_block", "uniform", "red_noise", "green_noise", "blue_noise",
    "purple_noise",
]  # fmt: skip
Mask = Literal[Mined, Drawn]

# Share of the hidden patches that are mined (the others are drawn at random), at first and last.
HARD_SHARES: dict[str, tuple[float, float]] = {
    "easy_to_hard": (0.0, 0.5),
    "hard_to_easy": (0.5, 0.0),
    "moderate": (0.5, 0.5),
    "hardest": (1.0, 1.0),
    "easiest": (1.0, 1.0),
    "attention": (1.0, 1.0),
}
assert set(HARD_SHARES) == set(get_args(Mined))

Schedule = Literal["linear", "cosine", "constant"]

# Numbers of independent draws from the same (seed, epoch, sample); masks have 0 and above.
BLOCKS, SECONDARY, TEACHER_VIEW, TIES = -1, -2, -3, -4


def num_hidden_patches(num_patches: int, mask_ratio: float) -> int:
    """M = N - int(N (1 - mask_ratio)), as masked autoencoders count."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def hard_share(
    progress: float, start: float = 0.0, end: float = 0.5, schedule: Schedule = "linear"
) -> float:
    """alpha: the share of the hidden patches that are mined, after a share `progress` of training.

    HPM, section 3.4, "easy-to-hard mask generation": from `start` to `end`. The paper's progress is
    (epoch + 1) / epochs. `cosine` changes slowly at both ends; `constant` is at `end` throughout.
    """
    if schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    if schedule == "constant":
        progress = 1.0
    return start + progress * (end - start)


def make_mask(
    mask: Mask,
    sample_ids: Int[Tensor, " batch"],
    grid: tuple[int, ...],
    num_hidden: int,
    seed: int,
    epoch: int,
    signal: Priority | None = None,
    num_hard: int = 0,
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """(visible_ids, hidden_ids) of a batch, always of the same lengths.

    `signal` is what is mined by: the predicted loss of each patch, or the attention to it; the
    `num_hard` highest (of `easiest`: lowest) are hidden, the others as drawn.
    """
    priority = drawn_priority(mask, sample_ids, grid, num_hidden, seed, epoch)
    if signal is not None and num_hard > 0:
        priority = hardest_first(priority, -signal if mask == "easiest" else signal, num_hard)
    return hide_top(priority, num_hidden)


def drawn_priority(
    mask: Mask,
    sample_ids: Int[Tensor, " batch"],
    grid: tuple[int, ...],
    num_hidden: int,
    seed: int,
    epoch: int,
) -> Priority:
    """What a mask hides before, or without, anything being mined."""
    priority = noise(sample_ids, math.prod(grid), seed, epoch)
    if mask == "block":
        return one_block(
            priority, noise(sample_ids, len(grid), seed, epoch, BLOCKS), grid, num_hidden
        )
    if mask == "multi_block":
        choices = noise(sample_ids, 4 * BLOCKS_TRIED, seed, epoch, BLOCKS)
        return multi_block(priority, choices.view(-1, BLOCKS_TRIED, 4), grid)
    if mask == "uniform":
        return one_visible_per_cell(priority, grid)
    if mask.endswith("_noise"):
        return colour_noise(priority, grid, mask.removesuffix("_noise"))
    return priority


def noise(
    sample_ids: Int[Tensor, " batch"], num_patches: int, seed: int, epoch: int, draw: int = 0
) -> Priority:
    """Uniform numbers in [0, 1): a pure function of (seed, epoch, sample, patch, draw).

    A counter-based generator (the finaliser of splitmix64 over the counters) instead of a random
    state: the mask of a sample is the same on every device, for any number of processes, workers
    or restarts, and costs no transfer. `draw` numbers independent masks of the same sample.
    """
    key = torch.zeros_like(sample_ids, dtype=torch.int64)
    for counter in (seed, epoch, draw):
        key = _mix(key + counter)
    key = _mix(key + sample_ids.long())
    patches = torch.arange(num_patches, device=sample_ids.device)
    bits = _mix(key[:, None] + patches)
    return ((bits >> 40) & 0xFFFFFF).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 so that neighbouring inputs give unrelated outputs (splitmix64)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hardest_first(priority: Priority, predicted_loss: Priority, num_hard: int) -> Priority:
    """Put the `num_hard` patches of highest predicted loss before all others."""
    if num_hard == 0:
        return priority
    hardest = predicted_loss.topk(num_hard, dim=1).indices
    return priority.scatter(1, hardest, torch.inf)


def hide_top(
    priority: Priority, num_hidden: int
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """Hide the `num_hidden` patches of highest priority: (visible_ids, hidden_ids).

    Both in raster order, always of the same length, whatever the priorities.
    """
    order = priority.argsort(dim=1, descending=True)
    hidden_ids = order[:, :num_hidden].sort(dim=1).values
    visible_ids = order[:, num_hidden:].sort(dim=1).values
    return visible_ids, hidden_ids


def one_block(
    priority: Priority,
    place: Float[Tensor, "batch axes"],
    grid: tuple[int, ...],
    num_hidden: int,
) -> Priority:
    """One square: the nearer to its centre, the sooner hidden; it lies within the image.

    `place` in [0, 1) says where; `priority` in [0, 1) which corner patches stay visible where the
    square has more patches than are hidden. Where the image is too narrow for a square, it is as
    wide as the image.
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
    return 0.5 * priority - distance  # distances differ by 1 or not at all


BLOCKS_TRIED = 32
BLOCK_AREA = (16 / 196, 0.4)  # share of the image
BLOCK_ASPECT = 0.3  # of the most oblong block


def multi_block(
    priority: Priority, choices: Float[Tensor, "batch blocks 4"], grid: tuple[int, ...]
) -> Priority:
    """Blocks of random size, shape and place, one after the other until enough is hidden (BEiT,
    algorithm 1); of the last one a random part.

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
    """Uniform sampling (UM-MAE): of each cell of two patches along every axis, one is visible.

    Raises ValueError where the grid is odd.
    """
    if any(size % 2 for size in grid):
        raise ValueError(f"a grid of {grid} has no cells of two along every axis")
    cell = torch.zeros(priority.shape[1], dtype=torch.int64, device=priority.device)
    for size, coordinates in zip(grid, _coordinates(grid, priority.device), strict=True):
        cell = cell * (size // 2) + coordinates.long() // 2
    members = cell.argsort(stable=True).view(-1, 2 ** len(grid))  # [cells patches-of-a-cell]
    chosen = priority[:, members].argmin(-1, keepdim=True)
    visible = members.expand(len(priority), -1, -1).gather(-1, chosen).flatten(1)
    return priority.scatter(1, visible, -1.0)


# Widths of the Gaussian filters, in patches.
FINE, COARSE = 1.0, 2.0


def colour_noise(priority: Priority, grid: tuple[int, ...], colour: str) -> Priority:
    """Filtered noise (ColorMAE), which needs no learning: red leaves low frequencies (large
    blobs), blue the high ones, green those between (small blobs), purple all but those between."""
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
    """Gaussian filter along every axis; the borders meet, so that no patch is special."""
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


def choose_covered(
    sample_ids: Int[Tensor, " batch"],
    visible_ids: Int[Tensor, "batch visible"],
    ratio: float,
    num_patches: int,
    seed: int,
    epoch: int,
) -> Int[Tensor, "batch covered"]:
    """Secondary masking (UM-MAE): int(V ratio) of the visible patches, whose content is replaced
    by something learned; they are encoded all the same."""
    priority = noise(sample_ids, num_patches, seed, epoch, SECONDARY).gather(1, visible_ids)
    count = int(visible_ids.shape[1] * ratio)
    return visible_ids.gather(1, priority.argsort(dim=1)[:, :count])


def rotating_masks(
    priority: Priority, num_hidden: int
) -> list[tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]]:
    """As few masks as possible that together hide every patch at least once."""
    count = priority.shape[1]
    order = priority.argsort(dim=1, descending=True)
    masks = []
    for start in range(0, count, num_hidden):
        turned = order.roll(-start, dims=1)
        hidden_ids, visible_ids = turned[:, :num_hidden], turned[:, num_hidden:]
        masks.append((visible_ids.sort(dim=1).values, hidden_ids.sort(dim=1).values))
    return masks


def to_mask(hidden_ids: Int[Tensor, "batch hidden"], num_patches: int) -> Tensor:
    """Boolean mask [B N], True where hidden: for files and figures."""
    mask = torch.zeros(len(hidden_ids), num_patches, dtype=torch.bool, device=hidden_ids.device)
    return mask.scatter(1, hidden_ids, True)

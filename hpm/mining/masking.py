"""Which patches to hide: every strategy is a priority per patch, one function hides the top M."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from hpm.core.config import HARD_SHARES, HardShareSchedule
from hpm.mining.draw import GUMBEL, SECONDARY, WITHIN_UNITS, Draw, Priority
from hpm.mining.strategies import find_mask, random
from hpm.mining.units import mean_of_units, unit_by_unit, unit_grid

FIRST = 1e30  # a priority above all others


def num_hidden_patches(num_patches: int, mask_ratio: float) -> int:
    """M = N - int(N (1 - mask_ratio)), as masked autoencoders count."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def hard_share(
    progress: float, start: float = 0.0, end: float = 0.5, schedule: HardShareSchedule = "linear"
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
    mask: str,
    draw: Draw,
    grid: tuple[int, ...],
    num_hidden: int,
    signal: Priority | None = None,
    num_hard: int = 0,
    temperature: float = 0.0,
    unit: int = 1,
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """(visible_ids, hidden_ids) of a batch, always of the same lengths.

    Args:
        mask: name of a mask, see `strategies.find_mask`.
        draw: the random numbers.
        grid: patches along each axis.
        num_hidden: patches that are hidden, M.
        signal: what is mined by: the predicted loss of each patch, or the attention to it.
        num_hard: how many of the hidden patches are those of the highest signal (of `easiest`: the
            lowest); the others are drawn at random.
        temperature: 0 mines the top of the list; above, see `perturb`.
        unit: mine and hide units of so many patches along each axis. The share of mined units is
            that of mined patches. If M is not a multiple of a unit's size, a random part of one
            unit is hidden: of one drawn at random, or of the least hard if all are mined.
    """
    units = unit_grid(grid, unit)
    num_units = math.ceil(num_hidden / unit ** len(grid))  # of which the last perhaps in part
    strategy = random if mask in HARD_SHARES else find_mask(mask)
    priority = strategy(draw, units, num_units)
    if signal is not None and num_hard > 0:
        if unit > 1:
            signal = mean_of_units(signal, grid, unit)
        if mask == "easiest":
            signal = -signal
        if temperature > 0:
            signal = perturb(signal, draw, temperature)
        priority = hardest_first(priority, signal, num_units * num_hard // num_hidden)
    if unit > 1:
        noise = draw.noise(math.prod(grid), WITHIN_UNITS)
        priority = unit_by_unit(priority, noise, grid, unit)
    return hide_top(priority, num_hidden)


def perturb(signal: Priority, draw: Draw, temperature: float) -> Priority:
    """The signal, standardised within each image, over the temperature, plus Gumbel noise.

    The patches of the k highest values are then k draws without replacement, each with a
    probability proportional to exp(standardised signal / temperature) among the patches that are
    left (the Gumbel top-k trick; Kool et al. 2019, arXiv 1903.06059). A patch of signal -inf comes
    last.
    """
    known = signal.isfinite()
    count = known.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(known, signal, 0.0)
    centred = torch.where(known, centred - centred.sum(1, keepdim=True) / count, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    standardised = torch.where(known, centred / (std + 1e-6), signal)
    gumbel = -(-draw.noise(signal.shape[1], GUMBEL).log()).log()
    return standardised / temperature + gumbel


def hardest_first(priority: Priority, predicted_loss: Priority, num_hard: int) -> Priority:
    """Put the `num_hard` patches of highest predicted loss before all others, hardest first."""
    if num_hard == 0:
        return priority
    hardest = predicted_loss.topk(num_hard, dim=1).indices
    highest = FIRST * torch.arange(num_hard, 0, -1, device=priority.device)
    return priority.scatter(1, hardest, highest.to(priority.dtype).expand_as(hardest))


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


def choose_covered(
    draw: Draw, visible_ids: Int[Tensor, "batch visible"], ratio: float, num_patches: int
) -> Int[Tensor, "batch covered"]:
    """Secondary masking (UM-MAE): int(V ratio) of the visible patches, whose content is replaced
    by something learned; they are encoded all the same."""
    priority = draw.noise(num_patches, SECONDARY).gather(1, visible_ids)
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

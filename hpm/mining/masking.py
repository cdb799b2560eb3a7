"""Choose the patches to hide. Every strategy gives patches a priority; the top M are hidden."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpm.core.choices import HARD_SHARES, HardShareSchedule, Tubes
from hpm.mining.draw import (
    CELLS,
    GUMBEL,
    SECONDARY,
    WITHIN_CELLS,
    WITHIN_UNITS,
    Draw,
    Priority,
)
from hpm.mining.strategies import find_mask, random
from hpm.mining.units import mean_of_units, unit_by_unit, unit_grid

__all__ = [
    "Draw",
    "hard_share",
    "hide_top",
    "make_mask",
    "num_hidden_patches",
    "random_mask",
    "to_mask",
]

TOP_PRIORITY = 1e30


def num_hidden_patches(num_patches: int, mask_ratio: float, times: int = 1) -> int:
    """M = N - int(N (1 - mask_ratio)), rounded as in MAE. times: of a tube, if whole tubes are
    hidden; the number of tubes is then rounded."""
    tubes = num_patches // times
    return times * (tubes - int(tubes * (1 - mask_ratio)))


def hard_share(
    progress: float, start: float = 0.0, end: float = 0.5, schedule: HardShareSchedule = "linear"
) -> float:
    """alpha: the share of the hidden patches that are mined, at `progress` (0 to 1) of training.

    HPM, section 3.4, "easy-to-hard mask generation": rises from `start` to `end`. The paper's
    progress is (epoch + 1) / epochs. `constant` is `end` throughout.
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
    tubes: Tubes = "none",
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """(visible_ids, hidden_ids) of a batch, always of the same lengths.

    Args:
        mask: name of a mask, see `strategies.find_mask`.
        draw: the random numbers.
        grid: patches along each axis.
        num_hidden: number of hidden patches, M.
        signal: hardness of each patch: its predicted loss, or the attention to it.
        num_hard: number of mined patches, those of the highest signal (`easiest`: the lowest). The
            other hidden patches are drawn at random.
        temperature: 0 mines the patches of highest signal; above 0, see `perturb`.
        unit: mine and hide units of this many patches along each axis. The same share of units is
            mined as of patches. If M is not a multiple of a unit's size, a random part of one unit
            is hidden: a random unit, or the least hard one if all are mined.
        tubes: of a clip, hide the same places at all times, and mine them by the mean or maximum of
            the signal over time. The numbers of patches are multiples of the times.
    """
    if tubes != "none":
        times, *places = grid
        if signal is not None:
            signal = over_time(signal, times, tubes)
        visible, hidden = make_mask(
            mask,
            draw,
            tuple(places),
            num_hidden // times,
            signal,
            num_hard // times,
            temperature,
            unit,
        )
        return at_all_times(visible, grid), at_all_times(hidden, grid)
    units = unit_grid(grid, unit)
    num_units = math.ceil(num_hidden / unit ** len(grid))  # the last one may be hidden in part
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


def random_mask(
    draw: Draw, grid: tuple[int, ...], mask_ratio: float, tubes: Tubes = "none", purpose: int = 0
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """(visible_ids, hidden_ids): random patches, or random tubes."""
    places = grid if tubes == "none" else grid[1:]
    count = math.prod(places)
    visible, hidden = hide_top(draw.noise(count, purpose), num_hidden_patches(count, mask_ratio))
    if tubes == "none":
        return visible, hidden
    return at_all_times(visible, grid), at_all_times(hidden, grid)


def over_time(signal: Priority, times: int, tubes: Tubes) -> Float[Tensor, "batch places"]:
    """Mean or maximum of each place over time."""
    by_time = signal.unflatten(1, (times, -1))
    return by_time.amax(1) if tubes == "max" else by_time.mean(1)


def at_all_times(
    places: Int[Tensor, "batch places"], grid: tuple[int, ...]
) -> Int[Tensor, "batch patches"]:
    """The patches at these places at all times, in raster order."""
    starts = torch.arange(grid[0], device=places.device) * math.prod(grid[1:])
    return (starts[:, None] + places[:, None]).flatten(1)


def perturb(signal: Priority, draw: Draw, temperature: float) -> Priority:
    """Divide the signal, standardised per image, by the temperature, and add Gumbel noise.

    The k highest values are then k draws without replacement from softmax(standardised signal /
    temperature) (the Gumbel top-k trick; Kool et al. 2019, arXiv 1903.06059). Patches with signal
    -inf come last.
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
    """Give the `num_hard` patches of highest predicted loss the highest priorities, in order."""
    if num_hard == 0:
        return priority
    hardest = predicted_loss.topk(num_hard, dim=1).indices
    highest = TOP_PRIORITY * torch.arange(num_hard, 0, -1, device=priority.device)
    return priority.scatter(1, hardest, highest.to(priority.dtype).expand_as(hardest))


def hide_top(
    priority: Priority, num_hidden: int
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """Hide the `num_hidden` patches of highest priority: (visible_ids, hidden_ids).

    Both are in raster order, and their lengths do not depend on the priorities.
    """
    order = priority.argsort(dim=1, descending=True)
    hidden_ids = order[:, :num_hidden].sort(dim=1).values
    visible_ids = order[:, num_hidden:].sort(dim=1).values
    return visible_ids, hidden_ids


def choose_covered(
    draw: Draw, visible_ids: Int[Tensor, "batch visible"], ratio: float, num_patches: int
) -> Int[Tensor, "batch covered"]:
    """Secondary masking (UM-MAE): choose int(V ratio) of the V visible patches, whose content is
    replaced by a learned token before encoding."""
    priority = draw.noise(num_patches, SECONDARY).gather(1, visible_ids)
    count = int(visible_ids.shape[1] * ratio)
    return visible_ids.gather(1, priority.argsort(dim=1)[:, :count])


def choose_decoded(
    draw: Draw, hidden_ids: Int[Tensor, "batch hidden"], keep: float, grid: tuple[int, ...]
) -> Int[Tensor, "batch decoded"]:
    """Choose max(1, int(M keep)) of the hidden patches to reconstruct, in raster order, by running
    cells (VideoMAE V2, Wang et al. 2023, arXiv 2303.16727, section 3.2).

    The places are divided into cells of 2 x 2. The patches of a cell take turns over time, so that
    at a share of 0.5 each place is reconstructed half of the time. The first turn is random. If the
    hidden patches have too many or too few of a turn, a random part of it is chosen.
    """
    *_, rows, columns = grid
    patch = torch.arange(math.prod(grid), device=hidden_ids.device)
    row, column, time = patch // columns % rows, patch % columns, patch // (rows * columns)
    clockwise = torch.where(row % 2 == 0, column % 2, 3 - column % 2)
    first = (4 * draw.noise(1, CELLS)).long()
    turn = (clockwise - time - first) % 4
    priority = 0.5 * draw.noise(len(patch), WITHIN_CELLS) - turn
    count = max(1, int(hidden_ids.shape[1] * keep))
    best = priority.gather(1, hidden_ids).topk(count, dim=1).indices
    return hidden_ids.gather(1, best).sort(dim=1).values


def rotating_masks(
    priority: Priority, num_hidden: int
) -> list[tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]]:
    """The smallest set of masks that together hide every patch at least once."""
    count = priority.shape[1]
    order = priority.argsort(dim=1, descending=True)
    masks = []
    for start in range(0, count, num_hidden):
        rotated = order.roll(-start, dims=1)
        hidden_ids, visible_ids = rotated[:, :num_hidden], rotated[:, num_hidden:]
        masks.append((visible_ids.sort(dim=1).values, hidden_ids.sort(dim=1).values))
    return masks


def to_mask(hidden_ids: Int[Tensor, "batch hidden"], num_patches: int) -> Tensor:
    """Boolean mask [B N], True where hidden."""
    mask = torch.zeros(len(hidden_ids), num_patches, dtype=torch.bool, device=hidden_ids.device)
    return mask.scatter(1, hidden_ids, True)

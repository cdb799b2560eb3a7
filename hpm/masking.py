"""Which patches to hide: every strategy is a priority per patch, one function hides the top M."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Priority = Float[Tensor, "batch patches"]


def num_hidden_patches(num_patches: int, mask_ratio: float) -> int:
    """M = N - int(N (1 - mask_ratio)), as masked autoencoders count."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def hard_share(epoch: int, epochs: float, start: float = 0.0, end: float = 0.5) -> float:
    """alpha: the share of the hidden patches that are the hardest ones, at a 0-based epoch.

    HPM, section 3.4, "easy-to-hard mask generation": linear from `start` to `end`, never beyond.
    """
    return start + min(1.0, (epoch + 1) / epochs) * (end - start)


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


def to_mask(hidden_ids: Int[Tensor, "batch hidden"], num_patches: int) -> Tensor:
    """Boolean mask [B N], True where hidden: for files and figures."""
    mask = torch.zeros(len(hidden_ids), num_patches, dtype=torch.bool, device=hidden_ids.device)
    return mask.scatter(1, hidden_ids, True)

"""Stateless random numbers: a pure function of seed, epoch and sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Priority = Float[Tensor, "batch patches"]

# Purposes of independent draws for the same (seed, epoch, sample). Masks use 0 and above.
BLOCKS, SECONDARY, TEACHER_VIEW, TIES, GUMBEL, WITHIN_UNITS = -1, -2, -3, -4, -5, -6
CELLS, WITHIN_CELLS = -7, -8


@dataclass(frozen=True)
class Draw:
    """The seeds of a batch's random numbers."""

    seed: int
    epoch: int
    sample_ids: Int[Tensor, " batch"]

    def noise(self, count: int, purpose: int = 0) -> Float[Tensor, "batch count"]:
        """Uniform numbers in [0, 1), independent for each purpose."""
        return noise(self.sample_ids, count, self.seed, self.epoch, purpose)


def noise(
    sample_ids: Int[Tensor, " batch"], num_patches: int, seed: int, epoch: int, purpose: int = 0
) -> Priority:
    """Uniform numbers in [0, 1): a pure function of (seed, epoch, sample, patch, purpose).

    A counter-based generator (the finaliser of splitmix64), so that the mask of a sample is the
    same on every device, for any number of processes, workers or restarts. `purpose` distinguishes
    independent draws for the same sample.
    """
    key = torch.zeros_like(sample_ids, dtype=torch.int64)
    for counter in (seed, epoch, purpose):
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

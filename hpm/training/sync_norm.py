"""Batch norms whose statistics are those of all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpm.core import distributed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all processes on any device; `torch.nn.SyncBatchNorm` works on GPUs alone.

    All processes must have equally many values.
    """

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        x = input.float()
        # Variance about the mean of all, rather than the difference of squares, which cancels.
        mean = distributed.differentiable_mean(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = distributed.differentiable_mean(centred.square().mean((0, 2, 3)))
        self._track(mean, variance, distributed.world_size() * x.numel() // x.shape[1])
        normed = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.weight is not None:
            normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Running averages, as nn.BatchNorm2d keeps them."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.momentum is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * values / max(1, values - 1), self.momentum)


def batch_norm(device: torch.device) -> Callable[[int], nn.Module]:
    """What makes batch norms of maps, their statistics being those of all processes."""
    if distributed.world_size() == 1:
        return nn.BatchNorm2d
    return nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm2d

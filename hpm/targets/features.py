"""Features of the teacher or of a frozen model."""

from __future__ import annotations

from torch import Tensor

from hpm.mining.losses import normalized_squared_error
from hpm.targets.base import Images, Patches, PatchLoss, _RankedByLoss
from hpm.targets.frozen_model import FrozenModel


class TeacherTarget(_RankedByLoss):
    """The features that the EMA teacher gives the patch, seeing the whole image."""

    needs_teacher = True

    def __init__(self, dim: int, num_patches: int):
        self.dim, self.num_patches = dim, num_patches

    def __call__(self, images: Images, features: Tensor | None) -> Patches:
        assert features is not None
        return features[:, -self.num_patches :]

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return normalized_squared_error(prediction, target)


class FrozenTarget(_RankedByLoss):
    """The features that a frozen model gives the patch, seeing the whole image."""

    def __init__(self, model: FrozenModel, grid: tuple[int, ...], mean: Tensor, std: Tensor):
        self.model, self.grid, self.dim = model, grid, model.dim
        self.mean, self.std = mean, std

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        pixels = images * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        return self.model(pixels, (self.grid[0], self.grid[1]))

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return normalized_squared_error(prediction, target)

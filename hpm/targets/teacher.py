"""Target: features of the EMA teacher."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from hpm.core.config import PretrainConfig
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError
from hpm.mining.losses import normalized_squared_error
from hpm.targets.base import Images, Patches, PatchLoss, Target, TargetInputs


class TeacherTarget(Target):
    """Patch features of the EMA teacher on the full image."""

    needs_teacher = True

    def __init__(self, dim: int, num_patches: int):
        self.dim, self.num_patches = dim, num_patches

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        many = 10**9  # so that only a number of steps, or 0, is as short as one step
        if duration_steps(config.ema_horizon_end, many, many) <= 1:
            raise UserError(
                f"target teacher needs a teacher that lags, but ema_horizon_end of "
                f"{config.ema_horizon_end} makes it the student: pass a longer one"
            )

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> TeacherTarget:
        return cls(inputs.embed_dim, math.prod(inputs.grid))

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        assert features is not None
        return features[:, -self.num_patches :]

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return normalized_squared_error(prediction, target)

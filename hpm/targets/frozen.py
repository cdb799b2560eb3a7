"""Target: features of a frozen model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.mining.losses import normalized_squared_error
from hpm.targets.base import Images, Patches, PatchLoss, Target, TargetInputs, needs_images
from hpm.targets.frozen_model import FrozenModel, load_frozen


class FrozenTarget(Target):
    """Patch features of a frozen model on the full image."""

    config_options: ClassVar = ("target_model",)

    def __init__(self, model: FrozenModel, inputs: TargetInputs):
        self.model, self.inputs, self.dim = model, inputs, model.dim

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        needs_images(config)
        if config.target_model is None:
            raise UserError("target frozen needs --target-model, such as timm/NAME")
        if config.channels not in (1, 3):
            raise UserError(
                f"target frozen takes grey or RGB images, but channels is {config.channels}: "
                "pass another --target"
            )

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> FrozenTarget:
        assert config.target_model is not None
        return cls(load_frozen(config.target_model, inputs.fetch).to(inputs.device), inputs)

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        rows, columns = self.inputs.grid
        return self.model(self.inputs.to_pixels(images), (rows, columns))

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return normalized_squared_error(prediction, target)

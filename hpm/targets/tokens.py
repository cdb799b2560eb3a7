"""Target: tokens of a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.mining.losses import token_cross_entropy
from hpm.targets.base import Images, Patches, PatchLoss, Target, TargetInputs, needs_images
from hpm.targets.codebook import Codebook, load_codebook


class TokenTarget(Target):
    """The index of the nearest code of a codebook, with a cross-entropy loss (as in BEiT)."""

    config_options: ClassVar = ("codebook",)

    def __init__(self, codebook: Codebook, inputs: TargetInputs):
        self.codebook, self.inputs, self.dim = codebook, inputs, len(codebook.codes)

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        needs_images(config)
        if config.codebook is None:
            raise UserError("target tokens needs --codebook: hpm tokenize makes one")
        if not Path(config.codebook).expanduser().is_file():
            raise UserError(f"codebook {config.codebook}: no such file; hpm tokenize makes one")

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> TokenTarget:
        assert config.codebook is not None
        codebook = load_codebook(config.codebook).to(inputs.device)
        made_for = (codebook.patch_size, codebook.channels)
        if codebook.frozen is not None and inputs.channels not in (1, 3):
            raise UserError(
                f"codebook {config.codebook} is of features of a model of grey or RGB images, but "
                f"channels is {inputs.channels}: tokenize --of pixels"
            )
        if codebook.frozen is None and made_for != (inputs.patch_size, inputs.channels):
            raise UserError(
                f"codebook {config.codebook} is of patches of {list(codebook.patch_size)} pixels "
                f"and {counted(codebook.channels, 'channel')}, but patch_size is "
                f"{list(inputs.patch_size)} and channels {inputs.channels}: tokenize with those"
            )
        return cls(codebook, inputs)

    def __call__(
        self, images: Images, features: Tensor | None = None
    ) -> Int[Tensor, "batch patches 1"]:
        vectors = self.codebook.vectors(self.inputs.to_pixels(images), self.inputs.grid)
        # In float32: rounded distances would often select another code.
        device_type = "cpu" if images.is_meta else images.device.type  # meta: no autocast
        with torch.autocast(device_type, enabled=False):
            return self.codebook.nearest(vectors)[..., None]

    def patch_loss(self, prediction: Patches, target: Int[Tensor, "batch patches 1"]) -> PatchLoss:
        return token_cross_entropy(prediction, target[..., 0])

"""Targets: pixels, raw or normalised per patch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from hpm.core.choices import RankingSignal
from hpm.core.config import PretrainConfig
from hpm.mining.losses import squared_error
from hpm.models.patches import gather_patches, patchify
from hpm.targets.base import Ids, Images, Patches, PatchLoss, Target, TargetInputs

EPS = 1e-6  # added to the variance, for constant patches


class PixelTarget(Target):
    """Pixels of the patch, raw or standardised within it (MAE); HPM's targets.

    The predictor may rank by the loss in either; the two differ by the variance of the patch.
    """

    config_options: ClassVar[tuple[str, ...]] = ("ranking_signal",)

    def __init__(
        self,
        patch_size: tuple[int, ...],
        channels: int,
        normalized: bool,
        ranking_signal: RankingSignal = "target",
    ):
        self.patch_size, self.normalized = patch_size, normalized
        self.dim = math.prod(patch_size) * channels
        by_normalized = {"target": normalized, "pixels": False, "normalized_pixels": True}
        self.by_normalized = by_normalized[ranking_signal]

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> PixelTarget:
        normalized = config.target == "normalized_pixels"
        return cls(inputs.patch_size, inputs.channels, normalized, config.ranking_signal)

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        name: Literal["normalized_pixels", "pixels"] = (
            "normalized_pixels" if self.normalized else "pixels"
        )
        return pixel_target(images, self.patch_size, name)

    def to_pixels(self, prediction: Patches, patches: Patches) -> Patches:
        """The pixels that a prediction stands for. Of normalised ones, with the mean and standard
        deviation of the true patches."""
        if not self.normalized:
            return prediction
        mean, std = patch_statistics(patches)
        return prediction * std + mean

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return squared_error(prediction, target)

    def ranked_by(self, patch_loss: PatchLoss, images: Images, hidden_ids: Ids) -> PatchLoss:
        if self.by_normalized == self.normalized:
            return patch_loss
        patches = gather_patches(patchify(images, self.patch_size), hidden_ids)
        variance = patch_statistics(patches)[1].square().squeeze(-1)
        return patch_loss / variance if self.by_normalized else patch_loss * variance


class ChannelTarget(PixelTarget):
    """Pixels standardised within each channel of the patch, as VideoMAE does."""

    config_options: ClassVar[
        tuple[str, ...]
    ] = ()  # their loss is no multiple of the loss on raw pixels

    def __init__(self, patch_size: tuple[int, ...], channels: int):
        super().__init__(patch_size, channels, normalized=True)
        self.channels = channels

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> ChannelTarget:
        return cls(inputs.patch_size, inputs.channels)

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        patches = patchify(images, self.patch_size)
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def to_pixels(self, prediction: Patches, patches: Patches) -> Patches:
        mean, std = self._statistics(patches)
        return prediction * std + mean

    def _statistics(self, patches: Patches) -> tuple[Patches, Patches]:
        """Mean and standard deviation of each value's channel."""
        by_channel = patches.unflatten(-1, (-1, self.channels)).transpose(2, 3)
        mean, std = (s.transpose(2, 3) for s in patch_statistics(by_channel))
        pixels = (1, 1, patches.shape[-1] // self.channels, 1)
        return mean.repeat(pixels).flatten(2), std.repeat(pixels).flatten(2)


def pixel_target(
    images: Images, patch_size: tuple[int, ...], target: Literal["pixels", "normalized_pixels"]
) -> Patches:
    """Pixels of every patch, or pixels standardised within their patch (unbiased variance)."""
    patches = patchify(images, patch_size)
    if target == "pixels":
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def patch_statistics(patches: Float[Tensor, "*patches values"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [... 1] of each patch, with which pixels are normalised."""
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True)
    return mean, (variance + EPS).sqrt()

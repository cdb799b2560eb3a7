"""The base class of all targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError

Images = Float[Tensor, "batch channels *size"]
Patches = Float[Tensor, "batch patches values"]
PatchLoss = Float[Tensor, "batch hidden"]
Ids = Int[Tensor, "batch hidden"]


@dataclass(frozen=True)
class TargetInputs:
    """The properties of images and model from which a target is built.

    Args:
        patch_size: pixels of a patch along each axis.
        grid: patches along each axis.
        channels: of the images.
        embed_dim: width of the encoder, and so of the teacher's features.
        mean, std: [C], with which the images are normalised.
        device: of the images.
        fetch: whether a model may be downloaded; False if its name comes from a file.
    """

    patch_size: tuple[int, ...]
    grid: tuple[int, ...]
    channels: int
    embed_dim: int
    mean: Float[Tensor, " channels"]
    std: Float[Tensor, " channels"]
    device: torch.device
    fetch: bool = True

    def to_pixels(self, images: Images) -> Images:
        """Normalised images -> images with values in [0, 1]."""
        shape = (-1,) + (1,) * len(self.grid)
        return images * self.std.view(shape) + self.mean.view(shape)


class Target(ABC):
    """Defines what the reconstructor predicts for each patch, and the loss of a prediction.

    A target is computed once per batch, without gradients. Its patch loss is what the student
    minimises, and what the predictor learns to rank.

    A subclass sets `dim`, the number of values per patch that the reconstructor predicts, and
    `needs_teacher` if it is computed from the teacher's features of the full image. Arguments of
    its constructor after the first are set by `--target-options name=value`, and converted to the
    types of their annotations.
    """

    dim: int
    needs_teacher: bool = False
    # Options of the config that only this target accepts.
    config_options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Raise UserError if the target cannot be used with these options."""
        return  # most targets have no restrictions

    @classmethod
    def build(cls, config: PretrainConfig, inputs: TargetInputs, **options: Any) -> Target:
        """Build the target of a checked config. options: those of `--target-options`."""
        return cls(inputs, **options)  # type: ignore[call-arg]

    @abstractmethod
    def __call__(
        self, images: Images, features: Float[Tensor, "batch tokens dim"] | None = None
    ) -> Tensor:
        """Normalised images -> the target of every patch, [B N values].

        features: the teacher's features of the full image, if `needs_teacher`.
        """

    @abstractmethod
    def patch_loss(self, prediction: Patches, target: Tensor) -> PatchLoss:
        """The error of each hidden patch: [B M dim] and [B M values] -> [B M]."""

    def ranked_by(self, patch_loss: PatchLoss, images: Images, hidden_ids: Ids) -> PatchLoss:
        """The losses [B M] whose order the predictor learns (default: the patch loss)."""
        return patch_loss


def needs_images(config: PretrainConfig) -> None:
    """Raise UserError for clips, for targets that only images have."""
    if config.frames > 1:
        raise UserError(
            f"target {config.target} takes images, but frames is {config.frames}: pass --target "
            "normalized_pixels, normalized_channels, pixels, hog or teacher"
        )

"""What the reconstructor has to predict for each patch, and how far off it is.

A target is computed once per batch, without gradients: values [B N P]. Its patch loss [B M] is what
the student minimises, and what the predictor learns to rank."""

from __future__ import annotations

import math

import torch

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.models.architecture import Architecture
from hpm.models.patches import grid_size
from hpm.targets.base import Target
from hpm.targets.codes import TokenTarget
from hpm.targets.features import FrozenTarget, TeacherTarget
from hpm.targets.frozen_model import load_frozen
from hpm.targets.hog import HogTarget
from hpm.targets.pixels import PixelTarget
from hpm.targets.tokens import load_codebook


def make_target(
    config: PretrainConfig,
    architecture: Architecture,
    mean: list[float],
    std: list[float],
    device: torch.device,
    fetch: bool = True,
) -> Target:
    """The target of a checked config; `mean` and `std` are those that images are normalised by.

    fetch: see `load_frozen`. Raises UserError where a frozen model or a codebook is not there or
    does not fit.
    """
    patch_size, channels = architecture.patch_size, architecture.channels
    grid = grid_size(architecture.image_size, patch_size)
    moments = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    if config.target == "hog":
        return HogTarget(patch_size, channels)
    if config.target == "teacher":
        return TeacherTarget(architecture.embed_dim, math.prod(grid))
    if config.target == "frozen":
        assert config.target_model is not None
        return FrozenTarget(load_frozen(config.target_model, fetch).to(device), grid, *moments)
    if config.target == "tokens":
        assert config.codebook is not None
        codebook = load_codebook(config.codebook).to(device)
        made_for = (codebook.patch_size, codebook.channels)
        if codebook.frozen is not None and channels not in (1, 3):
            raise UserError(
                f"codebook {config.codebook} is of features of a model of grey or RGB images, but "
                f"channels is {channels}: tokenize --of pixels"
            )
        if codebook.frozen is None and made_for != (patch_size, channels):
            raise UserError(
                f"codebook {config.codebook} is of patches of {list(codebook.patch_size)} pixels "
                f"and {counted(codebook.channels, 'channel')}, but patch_size is "
                f"{list(patch_size)} and channels {channels}: tokenize with those"
            )
        return TokenTarget(codebook, *moments, grid)
    normalized = config.target == "normalized_pixels"
    return PixelTarget(patch_size, channels, normalized, config.ranking_signal)

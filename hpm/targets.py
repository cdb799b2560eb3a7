"""What the reconstructor has to predict for each patch, and how far off it is.

A target is computed once per batch, without gradients: values [B N P]. Its patch loss [B M] is what
the student minimises, and what the predictor learns to rank.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpm.config import PretrainConfig, RankingSignal
from hpm.errors import UserError, counted
from hpm.frozen import FrozenModel, load_frozen
from hpm.mining.losses import normalized_squared_error, squared_error, token_cross_entropy
from hpm.models.patches import gather_patches, grid_size, patchify
from hpm.tokens import Codebook, load_codebook

Images = Float[Tensor, "batch channels *size"]
Patches = Float[Tensor, "batch patches values"]
PatchLoss = Float[Tensor, "batch hidden"]
Ids = Int[Tensor, "batch hidden"]

EPS = 1e-6
HOG_BINS = 9
HOG_CELL = 8  # pixels


@runtime_checkable
class Target(Protocol):
    """What the training step needs of a target.

    dim: values per patch that the reconstructor predicts. needs_teacher: whether the teacher's
    features of the whole image, [B 1+N D], are passed in.
    """

    dim: int
    needs_teacher: bool

    def __call__(self, images: Tensor, features: Tensor | None) -> Tensor:
        """Normalised images -> target of every patch, [B N P]."""
        ...

    def patch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[B M P] each -> [B M]."""
        ...

    def ranked_by(self, patch_loss: Tensor, images: Tensor, hidden_ids: Tensor) -> Tensor:
        """The losses [B M] whose order the predictor learns."""
        ...


class _RankedByLoss:
    """The predictor ranks by the patch loss itself."""

    needs_teacher = False

    def ranked_by(self, patch_loss: PatchLoss, images: Images, hidden_ids: Ids) -> PatchLoss:
        return patch_loss


class PixelTarget(_RankedByLoss):
    """Pixels of the patch, raw or standardised within it (MAE); HPM's targets.

    Whichever is reconstructed, the predictor may rank by the loss in the other: they differ by the
    variance of the patch.
    """

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

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        name: Literal["normalized_pixels", "pixels"] = (
            "normalized_pixels" if self.normalized else "pixels"
        )
        return pixel_target(images, self.patch_size, name)

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return squared_error(prediction, target)

    def ranked_by(self, patch_loss: PatchLoss, images: Images, hidden_ids: Ids) -> PatchLoss:
        if self.by_normalized == self.normalized:
            return patch_loss
        patches = gather_patches(patchify(images, self.patch_size), hidden_ids)
        variance = patch_statistics(patches)[1].square().squeeze(-1)
        return patch_loss / variance if self.by_normalized else patch_loss * variance


def pixel_target(
    images: Images, patch_size: tuple[int, ...], target: Literal["pixels", "normalized_pixels"]
) -> Patches:
    """Pixels of every patch, or pixels standardised within their patch (unbiased variance)."""
    patches = patchify(images, patch_size)
    if target == "pixels":
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def patch_statistics(patches: Patches) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B N 1] of each patch, by which normalised pixels are undone."""
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True)
    return mean, (variance + EPS).sqrt()


class HogTarget(_RankedByLoss):
    """Histograms of oriented gradients (MaskFeat): of every channel, nine directions in cells of 8
    pixels (of the patch, where 8 does not divide it), each histogram of unit length."""

    def __init__(self, patch_size: tuple[int, ...], channels: int):
        self.cells = tuple(HOG_CELL if size % HOG_CELL == 0 else size for size in patch_size)
        # How many cells a patch has along each axis.
        self.per_patch = tuple(p // c for p, c in zip(patch_size, self.cells, strict=True))
        self.dim = math.prod(self.per_patch) * channels * HOG_BINS

    def __call__(self, images: Images, features: Tensor | None = None) -> Patches:
        height, width = self.cells
        return patchify(hog(images, (height, width)), self.per_patch)

    def patch_loss(self, prediction: Patches, target: Patches) -> PatchLoss:
        return squared_error(prediction, target)


def hog(
    images: Float[Tensor, "batch channels height width"], cell: tuple[int, int]
) -> Float[Tensor, "batch values rows columns"]:
    """Histograms of oriented gradients of every cell and channel (Dalal and Triggs 2005).

    Central differences (none across the border), unsigned directions in nine bins, weighted by the
    gradient's length, without interpolation between bins; each histogram of L2 norm 1.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // cell[0], width // cell[1]
    images = images.float()
    dy, dx = torch.zeros_like(images), torch.zeros_like(images)
    dy[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    dx[..., 1:-1] = images[..., 2:] - images[..., :-2]
    angle = torch.atan2(dy, dx) / math.pi % 1.0
    bins = (angle * HOG_BINS).long().clamp(max=HOG_BINS - 1)
    y = torch.arange(height, device=images.device) // cell[0]
    x = torch.arange(width, device=images.device) // cell[1]
    place = (y[:, None] * columns + x) * HOG_BINS + bins
    histograms = images.new_zeros(batch, channels, rows * columns * HOG_BINS)
    histograms.scatter_add_(2, place.flatten(2), torch.hypot(dy, dx).flatten(2))
    histograms = histograms.view(batch, channels, rows, columns, HOG_BINS) / math.prod(cell)
    histograms = histograms / (histograms.square().sum(-1, keepdim=True) + 1e-10).sqrt()
    return histograms.permute(0, 1, 4, 2, 3).flatten(1, 2)


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


class TokenTarget(_RankedByLoss):
    """The number of the nearest code of a codebook (as BEiT), told by cross-entropy."""

    def __init__(self, codebook: Codebook, mean: Tensor, std: Tensor, grid: tuple[int, ...]):
        self.codebook, self.dim, self.grid = codebook, len(codebook.codes), grid
        self.mean, self.std = mean, std

    def __call__(
        self, images: Images, features: Tensor | None = None
    ) -> Int[Tensor, "batch patches 1"]:
        pixels = images * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        vectors = self.codebook.vectors(pixels, self.grid)
        # In full precision: rounded distances would often name another code.
        with torch.autocast(images.device.type, enabled=False):
            return self.codebook.nearest(vectors)[..., None]

    def patch_loss(self, prediction: Patches, target: Int[Tensor, "batch patches 1"]) -> PatchLoss:
        return token_cross_entropy(prediction, target[..., 0])


def make_target(
    config: PretrainConfig,
    architecture: dict[str, Any],
    mean: list[float],
    std: list[float],
    device: torch.device,
    fetch: bool = True,
) -> Target:
    """The target of a checked config; `mean` and `std` are those that images are normalised by.

    fetch: see `load_frozen`. Raises UserError where a frozen model or a codebook is not there or
    does not fit.
    """
    patch_size, channels = tuple(architecture["patch_size"]), architecture["channels"]
    grid = grid_size(tuple(architecture["image_size"]), patch_size)
    moments = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    if config.target == "hog":
        return HogTarget(patch_size, channels)
    if config.target == "teacher":
        return TeacherTarget(architecture["embed_dim"], math.prod(grid))
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

"""The base class of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.core.errors import UserError
from hpm.models.patches import grid_size


class Encoder(nn.Module):
    """Maps images to prefix tokens followed by one token per visible patch.

    Prefix tokens (class tokens first, then registers; possibly none) have no position in the image.
    Patches are numbered in raster order of `grid`.

    An encoder of your own is called with `image_size`, `patch_size`, `channels` and `drop_path`. It
    must define `forward`, `embed_dim` and `blocks`; the other attributes default to those of an
    encoder without prefix tokens and without `pos_embed`.
    """

    image_size: tuple[int, ...]  # pixels along each axis
    patch_size: tuple[int, ...]  # pixels along each axis of the unit that is hidden or visible
    grid: tuple[int, ...]
    num_patches: int
    channels: int
    embed_dim: int
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    num_class_tokens: int = 1  # if it has any
    pos_embed: nn.Parameter | None
    blocks: nn.ModuleList | nn.Sequential
    norm: nn.Module
    checkpoint_activations: bool = False  # trade time for memory in the backward pass

    def set_sizes(
        self, image_size: Sequence[int], patch_size: Sequence[int], channels: int
    ) -> None:
        """Set the attributes that follow from these, for a constructor. Raises ValueError if the
        patches do not fill the image."""
        self.image_size, self.patch_size = tuple(image_size), tuple(patch_size)
        self.grid = grid_size(self.image_size, self.patch_size)
        self.num_patches = prod(self.grid)
        self.channels = channels

    def forward(
        self,
        images: Float[Tensor, "batch channels *size"],
        visible_ids: Int[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised images -> prefix tokens, then visible patches (default: all), normed."""
        raise NotImplementedError

    def pooled_class_token(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch dim"] | None:
        """The class token among the tokens of `forward`, or the mean of several; None without."""
        if not self.has_class_token:
            return None
        if self.num_class_tokens == 1:
            return tokens[:, 0]
        return tokens[:, : self.num_class_tokens].mean(1)

    def feature_maps(
        self, images: Float[Tensor, "batch channels *size"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "batch dim *grid"]]:
        """Patch tokens after each of these blocks (numbered from 0), not normed, as maps.

        Prefix tokens are dropped. Raises UserError unless the encoder is a plain ViT.
        """
        raise UserError(f"a {type(self).__name__} has no maps of single blocks: take a plain ViT")

    def patch_map(
        self, tokens: Float[Tensor, "batch tokens dim"], image_size: Sequence[int]
    ) -> Float[Tensor, "batch dim *grid"]:
        """The patch tokens of images of this size, as a map."""
        patches = tokens[:, self.num_prefix_tokens :].transpose(1, 2)
        return patches.unflatten(2, grid_size(image_size, self.patch_size))

    def with_attention(
        self, images: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads patches"]]:
        """Features of full images, and the attention of the class token to the patches in the last
        block. Not supported by every encoder."""
        raise NotImplementedError

    def fit_positions(self, weights: dict[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Resample the positions in weights of the same encoder from `grid` to this one's grid.

        Raises UserError if the encoder does not support another grid.
        """
        if grid != self.grid:
            raise UserError(
                f"a {type(self).__name__} has no positions to resample: use the image size of its "
                "pre-training"
            )
        return weights

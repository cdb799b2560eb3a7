"""What every encoder is, whatever it is made of."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


class Encoder(nn.Module):
    """Turns images into one token per visible patch, in front of them the prefix tokens.

    The prefix tokens (class token first, then registers; there may be none) have no place in the
    image. Patches are numbered in raster order of `grid`.
    """

    image_size: tuple[int, ...]  # pixels along each axis
    patch_size: tuple[int, ...]  # pixels of what is hidden or visible as a whole
    grid: tuple[int, ...]
    num_patches: int
    channels: int
    embed_dim: int
    num_prefix_tokens: int
    has_class_token: bool
    pos_embed: nn.Parameter | None
    blocks: nn.ModuleList | nn.Sequential
    norm: nn.Module
    checkpoint_activations: bool = False  # trade time for memory in the backward pass

    def forward(
        self,
        images: Float[Tensor, "batch channels *size"],
        visible_ids: Int[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised images -> prefix tokens, then visible patches (default: all), normed."""
        raise NotImplementedError

    def with_attention(
        self, images: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads patches"]]:
        """Features of whole images, and how the class token attends to the patches in the last
        block. Not every encoder can tell."""
        raise NotImplementedError

    def fit_positions(self, weights: dict[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Weights of the same encoder on another grid, positions resampled to this one's."""
        raise NotImplementedError

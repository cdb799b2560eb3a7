"""timm's Hiera models as encoders that run on a subset of their mask units."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.models.encoder import Encoder
from hpm.models.timm_models import create_model, mask_unit, resample_positions
from hpm.models.vit import run_block


class HieraEncoder(Encoder):
    """Hiera (Ryali et al. 2023, arXiv 2306.00989), a hierarchical encoder. Its mask units, 32
    pixels wide in the standard models, are the patches of this encoder.

    A mask unit starts as 8 x 8 tokens and ends as one. Attention is first within units and later
    global, so that hidden units can be dropped throughout. There are no prefix tokens. Arguments
    and errors are those of TimmEncoder; the model determines the size of the mask units.
    """

    def __init__(
        self,
        name: str,
        image_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] | None = None,
        channels: int = 3,
        drop_path: float = 0.0,
        pretrained: bool = False,
        **timm_options: Any,
    ):
        super().__init__()
        options = {"img_size": tuple(image_size), "in_chans": channels} | timm_options
        model = create_model(name, pretrained, drop_path_rate=drop_path, **options)
        self.name = name
        self.set_sizes(image_size, mask_unit(model), channels)
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            raise ValueError(f"the mask units are of {self.patch_size} pixels, not {patch_size}")
        if model.mu_size != prod(model.q_stride) ** model.q_pool:
            raise ValueError(f"the mask units of {name} do not end as one token")
        self.embed_dim = model.num_features
        self.unit_tokens = model.mask_unit_size
        self.stage_ends = model.stage_ends

        self.patch_embed = model.patch_embed
        self.pos_embed = model.pos_embed
        self.pos_embed_win = model.pos_embed_win
        self.unroll = model.unroll
        self.reroll = model.reroll
        self.blocks = model.blocks
        self.norm = model.head.norm

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        visible_ids: Int[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised images -> one token per visible mask unit (default: all), normed."""
        x = self._embed(images, visible_ids)
        for block in self.blocks:
            x = run_block(block, x, self.checkpoint_activations)
        return self.norm(x)

    def pyramid(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Feature maps [B C H W] of all stages, finest first, for dense prediction.

        Their strides are 4, 8, 16 and 32 in the standard models.
        """
        x, maps = self._embed(images, None), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.stage_ends:
                maps.append(self.reroll(x, number).permute(0, 3, 1, 2))
        return maps

    def fit_positions(self, weights: dict[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Resample the positions in weights of the same encoder from `grid`, as timm does.

        Models with window positions resample their global positions in `forward`.
        """
        if self.pos_embed_win is not None or grid == self.grid:
            return weights
        before, after = (
            tuple(g * u for g, u in zip(sides, self.unit_tokens, strict=True))
            for sides in (grid, self.grid)
        )
        return weights | {"pos_embed": resample_positions(weights["pos_embed"], before, after, 0)}

    def _embed(
        self, images: Tensor, visible_ids: Tensor | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens of the visible units with positions, in the order that the blocks expect."""
        if visible_ids is None:
            return self.unroll(self.patch_embed(images) + self._positions())
        # The first convolution reaches across the borders of units: zero out hidden pixels.
        visible = images.new_zeros(len(images), self.num_patches).scatter_(1, visible_ids, 1)
        x = self.patch_embed(images, mask=visible.reshape(-1, 1, *self.grid))
        x = self.unroll(x + self._positions())
        # Unrolled, the tokens of a unit are far apart: [B tokens-of-a-unit units D].
        x = x.reshape(len(x), -1, self.num_patches, x.shape[-1])
        index = visible_ids[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
        return x.gather(2, index).flatten(1, 2)

    def _positions(self) -> Float[Tensor, "1 tokens dim"]:
        """One position per token; or the sum of a coarse global map and of one that is repeated in
        every unit (Bolya et al. 2023, arXiv 2311.05613)."""
        assert self.pos_embed is not None
        if self.pos_embed_win is None:
            return self.pos_embed
        within = self.pos_embed_win.tile(1, 1, *self.grid)
        size = within.shape[-2:]
        overall = F.interpolate(self.pos_embed, size, mode="bicubic", antialias=True)
        return (overall + within).flatten(2).transpose(1, 2)

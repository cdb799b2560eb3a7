"""timm's plain Vision Transformers as encoders that run on a subset of their patches.

This encoder and Hiera's (`hpm.models.hiera`) take the modules that they need from a timm model,
under timm's names, and run them on the visible patches only, without pooling and head. If timm
normalises only pooled features (`fc_norm`, or the norm in Hiera's head), that norm is applied to
each token here, under the name `norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.models.encoder import Encoder
from hpm.models.hiera import HieraEncoder
from hpm.models.patches import gather_patches, patchify
from hpm.models.timm_models import PREFIX, create_model, resample_positions, timm_module
from hpm.models.vit import run_block


class TimmEncoder(Encoder):
    """A plain Vision Transformer of timm, with any prefix tokens and absolute or rotary positions.

    Args:
        name: timm's name, e.g. `vit_tiny_patch16_224`, with or without a pretrained tag.
        image_size: pixels along each axis.
        patch_size: pixels of a patch along each axis (default: the model's own).
        channels: of the images.
        drop_path: rate of stochastic depth in the last block.
        pretrained: start from timm's weights, resampled to these sizes.
        timm_options: further arguments of timm.create_model, e.g. a smaller depth.

    Raises:
        UserError: if the model is unknown, cannot run on a subset of patches, or its weights are
            not available.
        ValueError: if the sizes do not match.
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
        if patch_size is not None:
            options["patch_size"] = tuple(patch_size)
        model = create_model(
            name, pretrained, drop_path_rate=drop_path, dynamic_img_size=False, **options
        )
        self.name = name
        self.set_sizes(image_size, model.patch_embed.patch_size, channels)
        self.embed_dim = model.embed_dim
        self.num_prefix_tokens = model.num_prefix_tokens
        self.has_class_token = model.cls_token is not None

        self.patch_embed = model.patch_embed
        self.cls_token = model.cls_token
        self.dist_token = getattr(model, "dist_token", None)
        self.reg_token = model.reg_token
        self.pos_embed = model.pos_embed
        self.rope = getattr(model, "rope", None)
        self.norm_pre = model.norm_pre
        self.blocks = model.blocks
        self.norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
        if self.rope is not None:
            # Position jitter would draw from the global random state.
            self.rope.aug_active = False

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        visible_ids: Int[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised images -> prefix tokens, then visible patches (default: all), normed."""
        x, options = self._start(images, visible_ids)
        for block, block_options in zip(self.blocks, options, strict=True):
            x = run_block(block, x, self.checkpoint_activations, **block_options)
        return self.norm(x)

    def feature_maps(
        self, images: Float[Tensor, "batch channels height width"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Patch tokens after each of these blocks (numbered from 0), not normed, as maps.

        Raises UserError for images of another size than the encoder's.
        """
        size = tuple(images.shape[2:])
        if size != self.image_size:
            raise UserError(
                f"images of {size} pixels, but {PREFIX}{self.name} was built for "
                f"{self.image_size}: build it for the size of the images"
            )
        x, options = self._start(images, None)
        maps = {}
        for number, block_options in enumerate(options):
            x = run_block(self.blocks[number], x, self.checkpoint_activations, **block_options)
            if number in blocks:
                maps[number] = self.patch_map(x, size)
        return [maps[number] for number in blocks]

    def _start(
        self, images: Tensor, visible_ids: Tensor | None
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """(input of the first block, further arguments of each block)."""
        patches = patchify(images, self.patch_size)
        if visible_ids is not None:
            patches = gather_patches(patches, visible_ids)
        x = self._add_positions(self._prefix(images.shape[0]), self._embed(patches), visible_ids)
        rotations = self._rotations(visible_ids)
        options: list[dict[str, Any]] = [{}] * len(self.blocks)
        if rotations is not None:
            options = [{"rope": rotation} for rotation in rotations]
        return self.norm_pre(x), options

    def fit_positions(self, weights: dict[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Resample the absolute positions in weights of the same encoder, as timm does."""
        if self.pos_embed is None or grid == self.grid:
            return weights
        prefix = self.pos_embed.shape[1] - self.num_patches
        return weights | {
            "pos_embed": resample_positions(weights["pos_embed"], grid, self.grid, prefix),
        }

    def _embed(
        self, patches: Float[Tensor, "batch patches values"]
    ) -> Float[Tensor, "batch patches dim"]:
        """timm's patch convolution, applied to patches, so that hidden ones are not computed."""
        proj = self.patch_embed.proj
        weight = proj.weight.movedim(1, -1).flatten(1)
        return self.patch_embed.norm(F.linear(patches, weight, proj.bias))

    def _prefix(self, batch: int) -> Float[Tensor, "batch prefix dim"]:
        tokens = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        if not tokens:
            return self.patch_embed.proj.weight.new_zeros(batch, 0, self.embed_dim)
        return torch.cat(tokens, dim=1).expand(batch, -1, -1)

    def _add_positions(
        self,
        prefix: Float[Tensor, "batch prefix dim"],
        patches: Float[Tensor, "batch visible dim"],
        visible_ids: Int[Tensor, "batch visible"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Concatenate prefix and patches. Models add positions to all tokens, to patches, or to
        none."""
        if self.pos_embed is not None:
            first = self.pos_embed.shape[1] - self.num_patches
            positions = self.pos_embed[:, first:].expand(patches.shape[0], -1, -1)
            if visible_ids is not None:
                positions = gather_patches(positions, visible_ids)
            patches = patches + positions
            if first:
                prefix = prefix + self.pos_embed[:, :first]
        return torch.cat([prefix, patches], dim=1)

    def _rotations(self, visible_ids: Tensor | None) -> list[Tensor] | None:
        """Rotary positions of the visible patches for each block, or None."""
        if self.rope is None:
            return None
        cached = hasattr(self.rope, "feat_shape")
        # [N 2d], or [blocks heads N 2d]
        rotations = self.rope.get_embed() if cached else self.rope.get_embed(shape=self.grid)
        each = list(rotations) if rotations.ndim == 4 else [rotations] * len(self.blocks)
        if visible_ids is None:
            return each
        if rotations.ndim == 4:
            return [r[:, visible_ids].transpose(0, 1) for r in each]  # [B heads V 2d]
        return [rotations[visible_ids][:, None]] * len(self.blocks)  # [B 1 V 2d]


def timm_encoder(name: str, **options: Any) -> TimmEncoder | HieraEncoder:
    """The encoder of a timm model, ViT or Hiera. options: those of TimmEncoder."""
    kind = HieraEncoder if timm_module(name) == "hiera" else TimmEncoder
    return kind(name, **options)


def pretrained_weights(
    encoder: TimmEncoder | HieraEncoder, **timm_options: Any
) -> dict[str, Tensor]:
    """timm's pretrained weights for this encoder, resampled to its sizes.

    Read from the cache or downloaded. Raises UserError if they are not available.
    """
    size: tuple[int, ...] = encoder.image_size
    if isinstance(encoder, HieraEncoder):  # timm cannot resample Hiera's weights
        size = need("timm", "timm", encoder.name).get_pretrained_cfg(encoder.name).input_size[1:]
    with torch.random.fork_rng(devices=[]):
        found = type(encoder)(
            encoder.name,
            size,
            encoder.patch_size,
            encoder.channels,
            pretrained=True,
            **timm_options,
        )
    return encoder.fit_positions(found.state_dict(), found.grid)

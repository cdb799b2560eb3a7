"""timm's plain Vision Transformers and Hieras as encoders that run on a subset of their patches.

Each takes over the parts of a timm model that an encoder needs, under timm's names, and runs them
on the visible patches alone. What comes behind them (pooling and head) stays behind. Where timm
norms the pooled features only (`fc_norm`, or the norm in Hiera's head), ours norms each token by
it, under the name `norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError, nearest, one_line
from hpm.core.extras import need
from hpm.models.encoder import Encoder
from hpm.models.patches import gather_patches, grid_size, patchify
from hpm.models.vit import run_block

PREFIX = "timm/"
# timm's modules (files) whose models can run on a subset of their patches.
ABLE = ("vision_transformer", "deit", "eva", "hiera")
UNABLE = {
    "beit": "its attention has a bias for each pair of places in the whole grid",
    "vision_transformer_relpos": "its attention has a bias for each pair of places in the grid",
    "vision_transformer_sam": "its attention runs in windows of the whole grid",
    "hieradet_sam2": "its attention runs in windows of the whole grid",
    "swin_transformer": "its attention runs in windows of the whole grid",
    "swin_transformer_v2": "its attention runs in windows of the whole grid",
    "vision_transformer_hybrid": "its patches come from a convolutional network",
}
OTHERWISE = "it is neither a plain Vision Transformer nor a Hiera"


class TimmEncoder(Encoder):
    """A plain Vision Transformer of timm: any prefix tokens, added or rotary positions.

    Args:
        name: timm's, e.g. `vit_tiny_patch16_224`, with or without the tag of its weights.
        image_size: pixels along each axis.
        patch_size: pixels of a patch along each axis (default: the model's own).
        channels: of the images.
        drop_path: rate of stochastic depth in the last block.
        pretrained: start from timm's weights, resampled to these sizes.
        timm_options: anything else that timm.create_model takes, e.g. a smaller depth.

    Raises:
        UserError: where the model is unknown, cannot run on a subset, or its weights are not there.
        ValueError: where sizes do not fit each other.
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
        model = _create(
            name, pretrained, drop_path_rate=drop_path, dynamic_img_size=False, **options
        )
        self.name = name
        self.image_size = tuple(image_size)
        self.patch_size = tuple(model.patch_embed.patch_size)
        self.grid = grid_size(self.image_size, self.patch_size)
        self.num_patches = prod(self.grid)
        self.channels = channels
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
            # Jittered positions would be drawn from the global random state.
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
        """Tokens as the first block takes them, and the other arguments of each block."""
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
        """Weights of the same encoder on another grid, added positions resampled (as by timm)."""
        if self.pos_embed is None or grid == self.grid:
            return weights
        prefix = self.pos_embed.shape[1] - self.num_patches
        return weights | {
            "pos_embed": _resample(weights["pos_embed"], grid, self.grid, prefix),
        }

    def _embed(
        self, patches: Float[Tensor, "batch patches values"]
    ) -> Float[Tensor, "batch patches dim"]:
        """timm's convolution, on patches that are already cut: nothing hidden is looked at."""
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
        """Prefix and patches in one row; a model adds positions to all, to the patches, or none."""
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
        """Rotary positions of the visible patches, for each block; None where there are none."""
        if self.rope is None:
            return None
        cached = hasattr(self.rope, "feat_shape")
        # [N 2d], or of each block and head: [blocks heads N 2d]
        rotations = self.rope.get_embed() if cached else self.rope.get_embed(shape=self.grid)
        each = list(rotations) if rotations.ndim == 4 else [rotations] * len(self.blocks)
        if visible_ids is None:
            return each
        if rotations.ndim == 4:
            return [r[:, visible_ids].transpose(0, 1) for r in each]  # [B heads V 2d]
        return [rotations[visible_ids][:, None]] * len(self.blocks)  # [B 1 V 2d]


class HieraEncoder(Encoder):
    """Hiera (Ryali et al. 2023, arXiv 2306.00989): a hierarchical encoder whose patches, for us,
    are its mask units, 32 pixels wide in the standard models.

    A mask unit begins as 8 by 8 tokens and ends as one. Attention is within units at first and
    among all of them later, so hidden units are left out throughout. There are no prefix tokens.
    Arguments and errors as of TimmEncoder; the size of the mask units is the model's.
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
        model = _create(name, pretrained, drop_path_rate=drop_path, **options)
        self.name = name
        self.image_size = tuple(image_size)
        self.patch_size = _mask_unit(model)
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            raise ValueError(f"the mask units are of {self.patch_size} pixels, not {patch_size}")
        if model.mu_size != prod(model.q_stride) ** model.q_pool:
            raise ValueError(f"the mask units of {name} do not end as one token")
        self.grid = grid_size(self.image_size, self.patch_size)
        self.num_patches = prod(self.grid)
        self.channels = channels
        self.embed_dim = model.num_features
        self.num_prefix_tokens = 0
        self.has_class_token = False
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
        """Feature maps [B C H W] of all stages, finest first, as detection heads want them.

        They are as large as the image divided by 4, 8, 16 and 32, in the standard models.
        """
        x, maps = self._embed(images, None), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.stage_ends:
                maps.append(self.reroll(x, number).permute(0, 3, 1, 2))
        return maps

    def fit_positions(self, weights: dict[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Weights of the same encoder on another grid, positions resampled (as by timm).

        Those with positions within windows have global ones of fixed size, which are resampled as
        the model runs.
        """
        if self.pos_embed_win is not None or grid == self.grid:
            return weights
        before, after = (
            tuple(g * u for g, u in zip(sides, self.unit_tokens, strict=True))
            for sides in (grid, self.grid)
        )
        return weights | {"pos_embed": _resample(weights["pos_embed"], before, after, 0)}

    def _embed(
        self, images: Tensor, visible_ids: Tensor | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens of the visible units with their positions, in the order that the blocks expect."""
        if visible_ids is None:
            return self.unroll(self.patch_embed(images) + self._positions())
        # The first convolution looks over the borders of the units: hidden pixels are blanked.
        visible = images.new_zeros(len(images), self.num_patches).scatter_(1, visible_ids, 1)
        x = self.patch_embed(images, mask=visible.reshape(-1, 1, *self.grid))
        x = self.unroll(x + self._positions())
        # Unrolled, the tokens of a unit are far apart: [B tokens-of-a-unit units D].
        x = x.reshape(len(x), -1, self.num_patches, x.shape[-1])
        index = visible_ids[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
        return x.gather(2, index).flatten(1, 2)

    def _positions(self) -> Float[Tensor, "1 tokens dim"]:
        """One for each token; or (Bolya et al. 2023, arXiv 2311.05613) the sum of a coarse global
        map and of one that is the same in every unit."""
        assert self.pos_embed is not None
        if self.pos_embed_win is None:
            return self.pos_embed
        within = self.pos_embed_win.tile(1, 1, *self.grid)
        size = within.shape[-2:]
        overall = F.interpolate(self.pos_embed, size, mode="bicubic", antialias=True)
        return (overall + within).flatten(2).transpose(1, 2)


def timm_encoder(name: str, **options: Any) -> TimmEncoder | HieraEncoder:
    """The encoder of a timm model of either kind; options as of TimmEncoder."""
    kind = HieraEncoder if _module(name) == "hiera" else TimmEncoder
    return kind(name, **options)


def pretrained_weights(
    encoder: TimmEncoder | HieraEncoder, **timm_options: Any
) -> dict[str, Tensor]:
    """timm's weights for this encoder, fitted to its sizes.

    From the disk, or else from the network; UserError where they are in neither.
    """
    size: tuple[int, ...] = encoder.image_size
    if isinstance(encoder, HieraEncoder):  # which timm cannot resample
        size = need("timm", "timm", encoder.name).get_pretrained_cfg(encoder.name).input_size[1:]
    with torch.random.fork_rng(devices=[]):
        found = type(encoder)(
            encoder.name, size, encoder.patch_size, encoder.channels, pretrained=True,
            **timm_options,
        )  # fmt: skip
    return encoder.fit_positions(found.state_dict(), found.grid)


@lru_cache
def timm_shape(name: str) -> dict[str, Any]:
    """What can be known of a timm model without building it: patch_size, embed_dim, depth,
    num_heads (not of a Hiera), class_token, and whether the size of the patches is fixed.

    Raises UserError where the model is unknown, or cannot run on a subset of its patches.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = _create(name, pretrained=False)
    shape = {"embed_dim": model.num_features, "depth": len(model.blocks)}
    if _module(name) == "hiera":
        return shape | {"patch_size": _mask_unit(model), "class_token": False, "fixed": True}
    heads = [m.num_heads for m in model.blocks.modules() if hasattr(m, "num_heads")]
    return shape | {
        "num_heads": heads[0],
        "patch_size": tuple(model.patch_embed.patch_size),
        "class_token": model.cls_token is not None,
        "fixed": False,
    }


@dataclass(frozen=True)
class TimmInput:
    """The images that timm's weights of a model were trained on: normalised by mean and std of each
    channel, full scale being 1."""

    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]


def timm_input(name: str) -> TimmInput:
    """As timm says it. UserError where it has no such model."""
    _module(name)
    config = need("timm", "timm", f"model {PREFIX}{name}").get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm does not say how images of {PREFIX}{name} are normalised")
    channels, height, width = config.input_size
    return TimmInput((height, width), channels, list(config.mean), list(config.std))


def check_weights(name: str) -> None:
    """Raises UserError where timm has no weights for this model at all."""
    timm = need("timm", "timm", f"model {PREFIX}{name}")
    _module(name)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"timm has no weights for {PREFIX}{name}: name another model")


def _create(name: str, pretrained: bool, **options: Any) -> Any:
    """The timm model, without a classifier."""
    _module(name)
    timm = need("timm", "timm", f"model {PREFIX}{name}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise UserError(
            f"the weights of {PREFIX}{name} cannot be had ({_first_sentence(error)}); "
            f"looked for in {_cache(timm, name)} and then on the network: put them there, or "
            "train without --pretrained"
        ) from None


def _first_sentence(error: Exception) -> str:
    return one_line(error).partition(". ")[0][:160].rstrip(".")


def _module(name: str) -> str:
    """timm's module (file) of the model. UserError where there is none such, or it is of no use."""
    timm = need("timm", "timm", f"model {PREFIX}{name}")
    architecture, _, tag = name.partition(".")
    known = timm.list_models(pretrained=True) if tag else timm.list_models()
    if name not in known:
        hint = nearest(f"{PREFIX}{name}", [f"{PREFIX}{n}" for n in known])
        raise UserError(f"model is '{PREFIX}{name}', which timm does not have{hint}")
    module = _defining_module(timm.model_entrypoint(architecture)).rpartition(".")[2]
    if module not in ABLE:
        raise UserError(
            f"{PREFIX}{name} cannot run on a part of its patches alone: "
            f"{UNABLE.get(module, OTHERWISE)}; take one that can, such as "
            f"{PREFIX}vit_small_patch16_224 or {PREFIX}hiera_tiny_224"
        )
    return module


def _defining_module(entrypoint: Callable[..., Any]) -> str:
    """The module of timm that defines the class of a model.

    That is the module of the entry point, unless the user registered the model with
    `timm.models.register_model`.
    """
    if entrypoint.__module__.startswith("timm."):
        return entrypoint.__module__
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        bases = type(entrypoint()).__mro__
    return next((b.__module__ for b in bases if b.__module__.startswith("timm.")), "")


def _mask_unit(model: Any) -> tuple[int, ...]:
    """Pixels of a Hiera's mask unit."""
    return tuple(s * u for s, u in zip(model.patch_stride, model.mask_unit_size, strict=True))


def _cache(timm: Any, name: str) -> str:
    """Where timm keeps the weights that it has fetched."""
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id:
        return str(need("huggingface_hub.constants", "timm", "--pretrained").HF_HUB_CACHE)
    return f"{torch.hub.get_dir()}/checkpoints"


def _resample(
    positions: Float[Tensor, "1 tokens dim"], grid: tuple[int, ...], new_grid: tuple[int, ...],
    num_prefix: int,
) -> Float[Tensor, "1 new_tokens dim"]:  # fmt: skip
    layers = need("timm.layers", "timm", "resampling positions")
    return layers.resample_abs_pos_embed(
        positions, list(new_grid), list(grid), num_prefix_tokens=num_prefix
    )

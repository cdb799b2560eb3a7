"""What fixes a model: sizes by name, and all numbers of an architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpm.core.config import TIMM, PretrainConfig, pair, secondary_mask_ratio
from hpm.core.errors import UserError


@dataclass(frozen=True)
class ModelSize:
    """Encoder: width, blocks, heads; the same of both decoders; usual patch size in pixels."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    patch_size: int = 16


SIZES: dict[str, ModelSize] = {
    "vit_nano": ModelSize(96, 4, 3, 64, 2, 2),
    "vit_tiny": ModelSize(192, 12, 3, 128, 4, 4),
    "vit_small": ModelSize(384, 12, 6, 256, 4, 8),
    "vit_base": ModelSize(768, 12, 12),
    "vit_large": ModelSize(1024, 24, 16),
    "vit_huge": ModelSize(1280, 32, 16, patch_size=14),
}


def resolve_model(config: PretrainConfig) -> dict[str, Any]:
    """Everything that fixes the architecture: plain numbers, as stored beside the weights."""
    encoder = _timm_shape(config) if config.model.startswith(TIMM) else {}
    width = encoder.get("embed_dim")
    size = nearest_size(width) if width else SIZES[config.model]
    own = {"embed_dim": size.embed_dim, "depth": size.depth, "num_heads": size.num_heads}
    return (encoder or own) | {
        "image_size": list(pair(config.image_size)),
        "patch_size": list(pair(config.patch_size or encoder.get("patch_size", size.patch_size))),
        "channels": config.channels,
        "decoder_dim": config.decoder_dim or size.decoder_dim,
        "decoder_depth": config.decoder_depth or size.decoder_depth,
        "decoder_heads": config.decoder_heads or size.decoder_heads,
        "with_predictor": config.predictor_loss != "none",
        "predictor_dim": config.predictor_dim or config.decoder_dim or size.decoder_dim,
        "predictor_depth": config.predictor_depth or config.decoder_depth or size.decoder_depth,
        "predictor_heads": config.predictor_heads or config.decoder_heads or size.decoder_heads,
        "predictor_head": config.predictor_head,
        "detach_predictor": config.predictor_detach,
        "with_cover": bool(secondary_mask_ratio(config)),
    }


def nearest_size(embed_dim: int) -> ModelSize:
    """Ours of the nearest width: its decoders serve encoders that are not ours."""
    return min(SIZES.values(), key=lambda size: abs(size.embed_dim - embed_dim))


def _timm_shape(config: PretrainConfig) -> dict[str, Any]:
    """What the architecture says of a timm model. UserError where it cannot be used."""
    from hpm.models.timm_models import timm_shape

    shape = dict(timm_shape(config.model.removeprefix(TIMM)))
    patch_size = config.patch_size
    if shape.pop("fixed") and patch_size and pair(patch_size) != shape["patch_size"]:
        height, width = shape["patch_size"]
        raise UserError(
            f"patch_size is {patch_size}, but the mask units of {config.model} are of {height} x "
            f"{width} pixels: leave --patch-size out"
        )
    return {"model": config.model} | shape

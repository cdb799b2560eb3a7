"""From plain numbers to models."""

from __future__ import annotations

from typing import Any

import torch

from hpm.models.mim import MaskedImageModel
from hpm.models.vit import VisionTransformer

ENCODER_OPTIONS = ("image_size", "patch_size", "channels", "embed_dim", "depth", "num_heads")


def build_encoder(architecture: dict[str, Any]) -> VisionTransformer:
    """An encoder of the given architecture (see `config.resolve_model`), randomly initialised."""
    return VisionTransformer(**{name: architecture[name] for name in ENCODER_OPTIONS})


def build_model(architecture: dict[str, Any], seed: int = 0) -> MaskedImageModel:
    """A whole model, initialised from `seed` without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedImageModel(
            build_encoder(architecture),
            architecture["decoder_dim"],
            architecture["decoder_depth"],
            architecture["decoder_heads"],
            with_predictor=architecture["with_predictor"],
        )

"""From plain numbers to models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpm.models.classifier import Classifier, Pool
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import grid_size
from hpm.models.seeds import part_seed, seeded
from hpm.models.timm_encoder import PREFIX, timm_encoder
from hpm.models.vit import VisionTransformer

ENCODER_OPTIONS = ("image_size", "patch_size", "channels", "embed_dim", "depth", "num_heads")


# Not in the checkpoints of the first version, whose models had what is the default now.
MODEL_OPTIONS = (
    "target_dim", "predictor_dim", "predictor_depth", "predictor_heads", "predictor_head",
    "detach_predictor", "with_cover",
)  # fmt: skip


def build_encoder(
    architecture: dict[str, Any], seed: int | None = None, drop_path: float = 0.0
) -> Encoder:
    """An encoder of the given architecture (see `config.resolve_model`), randomly initialised.

    One of timm's where the architecture names such a `model`, else ours. With a seed, from that
    seed and without touching the global random state.
    """
    name = architecture.get("model", "")
    with seeded(seed):
        if name.startswith(PREFIX):
            sizes = {n: architecture[n] for n in ("image_size", "patch_size", "channels")}
            return timm_encoder(name.removeprefix(PREFIX), **sizes, drop_path=drop_path)
        options = {n: architecture[n] for n in ENCODER_OPTIONS}
        return VisionTransformer(**options, drop_path=drop_path)


def build_model(architecture: dict[str, Any], seed: int = 0) -> MaskedImageModel:
    """A whole model, each part of it initialised from a seed of its own that follows from `seed`;
    the global random state is left alone."""
    with seeded(seed):
        model = MaskedImageModel(
            build_encoder(architecture, part_seed(seed, "encoder")),
            architecture["decoder_dim"],
            architecture["decoder_depth"],
            architecture["decoder_heads"],
            with_predictor=architecture["with_predictor"],
            **{name: architecture[name] for name in MODEL_OPTIONS if name in architecture},
        )
    model.init_decoder_weights(seed)
    return model


def build_classifier(
    architecture: dict[str, Any],
    weights: dict[str, Tensor] | None,
    num_classes: int,
    pool: Pool = "mean",
    image_size: tuple[int, int] | None = None,
    drop_path: float = 0.0,
    seed: int = 0,
) -> Classifier:
    """An encoder with these weights (random ones for None) and a new head, initialised from `seed`.

    Positions are interpolated for another image size. Raises ValueError where patches do not fit.
    """
    before = tuple(architecture["image_size"])
    size, patch_size = image_size or before, tuple(architecture["patch_size"])
    with seeded(seed):
        encoder = build_encoder(architecture | {"image_size": size}, drop_path=drop_path)
        if weights is not None:
            grid = grid_size(before, patch_size)
            encoder.load_state_dict(encoder.fit_positions(weights, grid))
        return Classifier(encoder, num_classes, pool)

"""From plain numbers to models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hpm.core.errors import UserError
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
    size = image_size or tuple(architecture["image_size"])
    with seeded(seed):
        encoder = resized_encoder(architecture, weights, size, drop_path)
        return Classifier(encoder, num_classes, pool)


def resized_encoder(
    architecture: dict[str, Any],
    weights: dict[str, Tensor] | None,
    image_size: tuple[int, int],
    drop_path: float = 0.0,
) -> Encoder:
    """An encoder with these weights (random ones for None), its positions interpolated for another
    image size. Raises UserError where the patches do not fit into it."""
    check_image_size(image_size, architecture["patch_size"])
    encoder = build_encoder(architecture | {"image_size": image_size}, drop_path=drop_path)
    if weights is not None:
        before = grid_size(tuple(architecture["image_size"]), tuple(architecture["patch_size"]))
        encoder.load_state_dict(encoder.fit_positions(weights, before))
    return encoder


def check_image_size(image_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raises UserError where an image is not made of whole patches."""
    for image, patch in zip(image_size, patch_size, strict=True):
        if image < patch or image % patch:
            fitting = max(1, round(image / patch)) * patch
            raise UserError(
                f"image_size {image} is not a multiple of this backbone's patch_size {patch}: "
                f"the nearest that fits is {fitting}"
            )

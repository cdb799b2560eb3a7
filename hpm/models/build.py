"""Build models from their architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from hpm.core.errors import UserError
from hpm.models.architecture import Architecture
from hpm.models.classifier import Classifier, Pool
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.models.own_encoder import own_encoder
from hpm.models.patches import grid_size
from hpm.models.seeds import part_seed, seeded
from hpm.models.timm_encoder import PREFIX, timm_encoder
from hpm.models.vit import VisionTransformer


def build_encoder(
    architecture: Architecture, seed: int | None = None, drop_path: float = 0.0
) -> Encoder:
    """Build a randomly initialised encoder: ours, or the one of timm or of the user that the
    architecture names.

    With a seed, the global random state is neither used nor changed.
    """
    with seeded(seed):
        if architecture.model is not None:
            timm_name = architecture.model.removeprefix(PREFIX)
            own = timm_name == architecture.model
            return (own_encoder if own else timm_encoder)(
                timm_name,
                image_size=architecture.image_size,
                patch_size=architecture.patch_size,
                channels=architecture.channels,
                drop_path=drop_path,
            )
        assert architecture.num_heads is not None, "our own ViT has as many heads in each block"
        return VisionTransformer(
            image_size=architecture.image_size,
            patch_size=architecture.patch_size,
            channels=architecture.channels,
            embed_dim=architecture.embed_dim,
            depth=architecture.depth,
            num_heads=architecture.num_heads,
            drop_path=drop_path,
            positions=architecture.positions,
            class_tokens=architecture.class_tokens if architecture.class_token else 0,
            final_norm=architecture.final_norm,
        )


def build_model(architecture: Architecture, seed: int = 0) -> MaskedImageModel:
    """Build a whole model. Each part is initialised from its own seed, derived from `seed`; the
    global random state is not changed. Raises ValueError for the architecture of an encoder."""
    with seeded(seed):
        model = MaskedImageModel(
            build_encoder(architecture, part_seed(seed, "encoder")),
            **asdict(architecture.need_decoders()),
            positions=architecture.positions,
        )
    model.init_decoder_weights(seed)
    return model


def build_empty_model(architecture: Architecture, seed: int = 0) -> MaskedImageModel:
    """The model of `build_model` without memory: its parameters are on the meta device, to be
    filled with the weights that `initial.draw_weights` draws.

    Encoders of timm and of the user are built whole, with their weights, because only they know how
    these are drawn.
    """
    seed_of_encoder = part_seed(seed, "encoder")
    with torch.device("meta" if architecture.model is None else "cpu"):
        encoder = build_encoder(architecture, seed_of_encoder)
    with torch.device("meta"):
        return MaskedImageModel(
            encoder, **asdict(architecture.need_decoders()), positions=architecture.positions
        )


def build_classifier(
    architecture: Architecture,
    weights: dict[str, Tensor] | None,
    num_classes: int,
    pool: Pool = "mean",
    image_size: tuple[int, ...] | None = None,
    drop_path: float = 0.0,
    seed: int = 0,
) -> Classifier:
    """An encoder with these weights (None: random ones) and a new head, initialised from `seed`.

    Positions are interpolated for another image size. Raises UserError if the image size is not a
    multiple of the patch size.
    """
    size = image_size or architecture.image_size
    with seeded(seed):
        encoder = resized_encoder(architecture, weights, size, drop_path)
        return Classifier(encoder, num_classes, pool)


def resized_encoder(
    architecture: Architecture,
    weights: dict[str, Tensor] | None,
    image_size: tuple[int, ...],
    drop_path: float = 0.0,
) -> Encoder:
    """An encoder with these weights (None: random ones), with positions interpolated for another
    image size. Raises UserError if the image size is not a multiple of the patch size."""
    check_image_size(image_size, architecture.patch_size)
    encoder = build_encoder(replace(architecture, image_size=image_size), drop_path=drop_path)
    if weights is not None:
        before = grid_size(architecture.image_size, architecture.patch_size)
        encoder.load_state_dict(encoder.fit_positions(weights, before))
    return encoder


def check_image_size(image_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise UserError if an image size is not a multiple of the patch size."""
    for image, patch in zip(image_size, patch_size, strict=True):
        if image < patch or image % patch:
            fitting = max(1, round(image / patch)) * patch
            raise UserError(
                f"image_size {image} is not a multiple of this backbone's patch_size {patch}: "
                f"the nearest that fits is {fitting}"
            )

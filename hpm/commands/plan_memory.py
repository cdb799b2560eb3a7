"""Estimate the memory of a training from what its graph saves for the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hpm.core.config import PretrainConfig
from hpm.mining.masking import num_hidden_patches
from hpm.models.architecture import Architecture
from hpm.models.build import build_model
from hpm.models.mim import MaskedImageModel

STATE_BYTES = 4 * 5  # of a weight: itself, its gradient, two moments, and the teacher's copy
OTHER = 1.0e9  # bytes of the libraries, and of a GPU's context


class Memory(NamedTuple):
    """Bytes that a training needs: for its weights, and for each image of a part of a batch."""

    fixed: float
    per_image: float

    def total(self, images: int) -> float:
        """Bytes, of a step on so many images at a time."""
        return self.fixed + images * self.per_image


def estimate_memory(architecture: Architecture, config: PretrainConfig, size: float) -> Memory:
    """What the weights, and the tensors saved for the backward pass of one image take.

    size: bytes of a saved number: 2 in bfloat16, 4 in float32.
    """
    model = build_model(architecture)
    weights = sum(parameter.numel() for parameter in model.parameters())
    one, two = (_saved(model, architecture, config.mask_ratio, images) for images in (1, 2))
    return Memory(STATE_BYTES * weights + OTHER, size * (two - one))


def _saved(
    model: MaskedImageModel, architecture: Architecture, mask_ratio: float, images: int
) -> int:
    """How many numbers the student's forward pass saves, beside its weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []  # so that no memory is used twice while it is counted

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    pixels = torch.zeros(images, architecture.channels, *architecture.image_size)
    patches = model.encoder.num_patches
    order, hidden = torch.arange(patches).repeat(images, 1), num_hidden_patches(patches, mask_ratio)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(pixels, order[:, hidden:], order[:, :hidden])
    storages = {x.untyped_storage().data_ptr(): x for x in kept}
    del output
    return sum(
        tensor.untyped_storage().nbytes() // tensor.element_size()
        for where, tensor in storages.items()
        if where not in own
    )

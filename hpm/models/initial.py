"""Draw the initial weights of a model layer by layer, without ever holding the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpm.models.mim import MaskedImageModel
from hpm.models.seeds import part_seed, seeded
from hpm.models.vit import VisionTransformer, init_weights

Put = Callable[[str, Tensor], None]  # (name of a parameter, its value)


def draw_weights(model: MaskedImageModel, seed: int, put: Put) -> None:
    """Draw the weights that `build_model` would give a model built by `build_empty_model`.

    put: called with the name and the value, on the CPU, of every parameter that is on the meta
        device. It must not draw random numbers.

    The model itself is not changed. No more than the weights of one layer exist at a time.
    """
    if isinstance(model.encoder, VisionTransformer):
        with seeded(part_seed(seed, "encoder")):
            _draw_encoder(model.encoder, lambda name, value: put(f"encoder.{name}", value))
    for name, part in model.decoder_parts().items():
        with seeded(part_seed(seed, name)):
            if isinstance(part, nn.Parameter):
                put(name, nn.init.normal_(torch.empty(part.shape), std=0.02))
            elif part is not None:
                _draw_layers(part, f"{name}.", put)
    put("decoder_pos_embed", model.fixed_positions())
    if model.cover is not None:
        put("cover", torch.zeros(model.cover.shape))


def _draw_encoder(encoder: VisionTransformer, put: Put) -> None:
    # PyTorch's layers draw weights when they are constructed, which `init_weights` replaces. They
    # are drawn here too, because the state of the generator depends on them.
    for module in encoder.modules():
        if any(True for _ in module.parameters(recurse=False)) and hasattr(
            module, "reset_parameters"
        ):
            _on_cpu(module).reset_parameters()
    if encoder.cls_token is not None:
        put("cls_token", nn.init.normal_(torch.empty(encoder.cls_token.shape), std=0.02))
    put("pos_embed", encoder.fixed_positions(encoder.grid))
    _draw_layers(encoder, "", put)


def _draw_layers(part: nn.Module, prefix: str, put: Put) -> None:
    """Draw the weights of all layers in the order of `nn.Module.apply`: children first."""
    for name, child in part.named_children():
        _draw_layers(child, f"{prefix}{name}.", put)
    if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm)):
        layer = _on_cpu(part)
        init_weights(layer)
        for name, value in layer.named_parameters(recurse=False):
            put(f"{prefix}{name}", value.detach())


def _on_cpu(layer: nn.Module) -> Any:
    """A copy of a layer with memory of its own, not initialised."""
    return copy.deepcopy(layer).to_empty(device="cpu")

"""timm's models by name: which are supported, their shapes, inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hpm.core.errors import UserError, nearest, one_line
from hpm.core.extras import need
from hpm.core.hub import offline_if_unreachable

PREFIX = "timm/"
# timm's modules (files) whose models can run on a subset of their patches.
SUPPORTED = ("vision_transformer", "deit", "eva", "hiera")
UNSUPPORTED = {
    "beit": "its attention has a bias for each pair of places in the whole grid",
    "vision_transformer_relpos": "its attention has a bias for each pair of places in the grid",
    "vision_transformer_sam": "its attention runs in windows of the whole grid",
    "hieradet_sam2": "its attention runs in windows of the whole grid",
    "swin_transformer": "its attention runs in windows of the whole grid",
    "swin_transformer_v2": "its attention runs in windows of the whole grid",
    "vision_transformer_hybrid": "its patches come from a convolutional network",
}
OTHER_REASON = "it is neither a plain Vision Transformer nor a Hiera"


@lru_cache
def timm_shape(name: str) -> dict[str, Any]:
    """Shape of a timm model, found on the meta device: patch_size, embed_dim, depth, num_heads (not
    for Hiera), class_token, and `fixed`, whether the patch size cannot be changed.

    Raises UserError if the model is unknown, or cannot run on a subset of its patches.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = create_model(name, pretrained=False)
    shape = {"embed_dim": model.num_features, "depth": len(model.blocks)}
    if timm_module(name) == "hiera":
        return shape | {"patch_size": mask_unit(model), "class_token": False, "fixed": True}
    heads = [m.num_heads for m in model.blocks.modules() if hasattr(m, "num_heads")]
    return shape | {
        "num_heads": heads[0],
        "patch_size": tuple(model.patch_embed.patch_size),
        "class_token": model.cls_token is not None,
        "fixed": False,
    }


@dataclass(frozen=True)
class TimmInput:
    """Input of a model's pretrained weights: image size, channels, and mean and std of each channel
    on a scale of 0 to 1."""

    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]


def timm_input(name: str) -> TimmInput:
    """The input of a model according to timm. Raises UserError for an unknown model."""
    timm_module(name)
    config = need("timm", "timm", f"model {PREFIX}{name}").get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm does not say how images of {PREFIX}{name} are normalised")
    channels, height, width = config.input_size
    return TimmInput((height, width), channels, list(config.mean), list(config.std))


def check_weights(name: str) -> None:
    """Raise UserError if timm has no weights for this model."""
    timm = need("timm", "timm", f"model {PREFIX}{name}")
    timm_module(name)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"timm has no weights for {PREFIX}{name}: name another model")


def create_model(name: str, pretrained: bool, **options: Any) -> Any:
    """The timm model, without a classifier."""
    timm_module(name)
    timm = need("timm", "timm", f"model {PREFIX}{name}")
    if not pretrained:
        return timm.create_model(name, num_classes=0, **options)
    with offline_if_unreachable() as offline:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0, **options)
        except Exception as error:
            why = "the network cannot be reached" if offline else _first_sentence(error)
    raise UserError(
        f"the weights of {PREFIX}{name} are not available ({why}); looked for in "
        f"{_cache(timm, name)} and then on the network: download them on a machine with a network "
        "and put them there, or train without --pretrained"
    )


def _first_sentence(error: Exception) -> str:
    return one_line(error).partition(". ")[0][:160].rstrip(".")


def timm_module(name: str) -> str:
    """The module of timm that defines a model. Raises UserError if the model is unknown or
    unsupported."""
    timm = need("timm", "timm", f"model {PREFIX}{name}")
    architecture, _, tag = name.partition(".")
    known = timm.list_models(pretrained=True) if tag else timm.list_models()
    if name not in known:
        hint = nearest(f"{PREFIX}{name}", [f"{PREFIX}{n}" for n in known])
        raise UserError(f"model is '{PREFIX}{name}', which timm does not have{hint}")
    module = _defining_module(timm.model_entrypoint(architecture)).rpartition(".")[2]
    if module not in SUPPORTED:
        raise UserError(
            f"{PREFIX}{name} cannot run on a subset of its patches: "
            f"{UNSUPPORTED.get(module, OTHER_REASON)}; take one that can, such as "
            f"{PREFIX}vit_small_patch16_224 or {PREFIX}hiera_tiny_224"
        )
    return module


def _defining_module(entrypoint: Callable[..., Any]) -> str:
    """The module of timm that defines the class of a model: that of its entry point, unless the
    user registered the model with `timm.models.register_model`."""
    if entrypoint.__module__.startswith("timm."):
        return entrypoint.__module__
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        bases = type(entrypoint()).__mro__
    return next((b.__module__ for b in bases if b.__module__.startswith("timm.")), "")


def mask_unit(model: Any) -> tuple[int, ...]:
    """Size of a Hiera's mask unit in pixels."""
    return tuple(s * u for s, u in zip(model.patch_stride, model.mask_unit_size, strict=True))


def _cache(timm: Any, name: str) -> str:
    """The cache folder of timm's weights."""
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id:
        return str(need("huggingface_hub.constants", "timm", "--pretrained").HF_HUB_CACHE)
    return f"{torch.hub.get_dir()}/checkpoints"


def resample_positions(
    positions: Float[Tensor, "1 tokens dim"],
    grid: tuple[int, ...],
    new_grid: tuple[int, ...],
    num_prefix: int,
) -> Float[Tensor, "1 new_tokens dim"]:
    layers = need("timm.layers", "timm", "resampling positions")
    return layers.resample_abs_pos_embed(
        positions, list(new_grid), list(grid), num_prefix_tokens=num_prefix
    )

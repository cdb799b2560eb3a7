"""Patch features of a frozen vision model from timm or Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError, nearest
from hpm.core.extras import need
from hpm.core.hub import fetched, read_json
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD

Pixels = Float[Tensor, "batch channels height width"]


class FrozenModel(nn.Module):
    """A frozen model with its own preprocessing.

    Args:
        extract: maps normalised RGB images of `size` to features [B D H W].
        model: holds the weights.
        size: (height, width) of its input in pixels.
        mean, std: normalisation of its input, on a scale of 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        extract: Callable[[Tensor], Tensor],
        model: nn.Module,
        size: tuple[int, int],
        mean: list[float],
        std: list[float],
    ):
        super().__init__()
        self.extract, self.size = extract, size
        self.model = model.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        try:
            self.dim: int = self.features(torch.zeros(1, 3, 8, 8)).shape[1]
        except (ValueError, RuntimeError) as error:
            name = type(model).__name__
            raise UserError(f"{name}: its features do not form a grid ({error})") from None

    @torch.no_grad()
    def features(self, pixels: Pixels) -> Float[Tensor, "batch dim rows columns"]:
        """Features on the model's own grid, for grey or RGB images of any size in [0, 1]."""
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
        return self.extract((pixels.clamp(0, 1) - self.mean) / self.std).float()

    def forward(self, pixels: Pixels, grid: tuple[int, int]) -> Float[Tensor, "batch patches dim"]:
        """Features of every patch of a grid, resampled if the model's own grid differs."""
        features = self.features(pixels)
        if tuple(features.shape[-2:]) != grid:
            features = F.interpolate(features, grid, mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)


def load_frozen(name: str, fetch: bool = True) -> FrozenModel:
    """Load `timm/NAME`, `hf/NAME`, or a folder with a model of either.

    fetch: download the model if it is not on disk; pass False for a name that comes from a weights
    file and not from the user. Raises UserError if the model is not available.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = read_json(folder / "config.json", needed=True)
        if "architecture" in config:
            return _load_timm(f"local-dir:{folder}", name, fetch)
        if "model_type" in config:
            return _load_hugging_face(str(folder), name, fetch)
        raise UserError(f"{name}: its config.json is neither of timm nor of Hugging Face")
    library, _, model = name.partition("/")
    if library == "timm" and model:
        return _load_timm(model, name, fetch)
    if library == "hf" and model:
        return _load_hugging_face(model, name, fetch)
    raise UserError(
        f"{name}: no such folder; name a folder, timm/NAME or hf/NAME (hf/facebook/dino-vits16)"
    )


def _load_timm(model_name: str, name: str, fetch: bool) -> FrozenModel:
    timm = need("timm", "timm", "a model of timm")
    data = need("timm.data", "timm", "a model of timm")
    local = model_name.startswith("local-dir:")
    if not local and not timm.is_model(model_name):
        raise UserError(f"{name}: timm has no such model{nearest(model_name, timm.list_models())}")
    command = f'python -c "import timm; timm.create_model({model_name!r}, pretrained=True)"'

    def load() -> Any:
        config = None if local else timm.get_pretrained_cfg(model_name)
        if not (fetch or local or (config and config.hf_hub_id)):
            # For other URLs, timm has no way to use only its cache.
            raise OSError("not of the hub")
        return timm.create_model(model_name, pretrained=True, num_classes=0)

    model = fetched(name, "timm", load, None if fetch else command)
    return of_timm(model, data.resolve_model_data_config(model))


def of_timm(model: Any, config: dict[str, Any]) -> FrozenModel:
    """Wrap a timm model. config: its data config (input_size, mean, std)."""
    _, height, width = config["input_size"]

    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)

    def extract(images: Tensor) -> Tensor:
        features = model.forward_features(images)
        return _on_grid(features, images.shape[-2:], patch_size, model.num_features)

    return FrozenModel(extract, model, (height, width), list(config["mean"]), list(config["std"]))


def _load_hugging_face(model_name: str, name: str, fetch: bool) -> FrozenModel:
    transformers = need("transformers", "hf", "a model of Hugging Face")
    hub: Any = need("transformers.utils", "hf", "a model of Hugging Face")
    command = None if fetch else f"hf download {model_name}"

    def load() -> Any:
        model = transformers.AutoModel.from_pretrained(
            model_name, trust_remote_code=False, local_files_only=not fetch
        )
        file = hub.cached_file(model_name, "preprocessor_config.json", local_files_only=not fetch)
        return model, file

    model, file = fetched(name, "hf", load, command)
    return of_hugging_face(model, read_json(Path(file), needed=True))


def of_hugging_face(model: Any, preprocessing: dict[str, Any]) -> FrozenModel:
    """Wrap a vision model of transformers, or the vision tower of a model such as CLIP.

    preprocessing: the contents of its preprocessor_config.json.
    """
    model = getattr(model, "vision_model", model)
    size = getattr(model.config, "image_size", None) or _input_size(preprocessing)
    height, width = (size, size) if isinstance(size, int) else size
    dim = getattr(model.config, "hidden_size", None) or model.config.hidden_sizes[-1]
    patch_size = getattr(model.config, "patch_size", None)

    def extract(images: Tensor) -> Tensor:
        features = model(pixel_values=images).last_hidden_state
        return _on_grid(features, images.shape[-2:], patch_size, dim)

    mean = preprocessing.get("image_mean", IMAGENET_MEAN)
    std = preprocessing.get("image_std", IMAGENET_STD)
    return FrozenModel(extract, model, (height, width), mean, std)


def _on_grid(
    features: Tensor, size: torch.Size, patch_size: int | tuple[int, int] | None, dim: int
) -> Float[Tensor, "batch dim rows columns"]:
    """Rearrange features to [B D H W], from tokens (prefix tokens are dropped) or from a map with
    channels first or last."""
    if features.ndim == 4:
        return features if features.shape[1] == dim else features.permute(0, 3, 1, 2)
    if patch_size is None:
        raise ValueError("it returns tokens, and its patch size is unknown")
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows, columns = size[0] // height, size[1] // width
    if rows * columns > features.shape[1]:
        raise ValueError(
            f"a model of {features.shape[1]} tokens, not of {rows} x {columns} patches"
        )
    return features[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def _input_size(preprocessing: dict[str, Any]) -> int:
    size = preprocessing.get("crop_size") or preprocessing.get("size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    return int(size)

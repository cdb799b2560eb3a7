"""The architecture of another library's weights, derived from the shapes of their tensors.

What shapes do not tell (attention heads, how images were normalised, the target) is read from a
JSON file beside the weights; otherwise it is assumed, and a note says so.
"""

from __future__ import annotations

from math import isqrt, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from hpm.core.config import PretrainConfig, pair
from hpm.core.errors import UserError, counted, size_text
from hpm.core.files import StateDict
from hpm.core.hub import read_json
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD
from hpm.models.architecture import SIZES, Architecture, Decoders
from hpm.models.patches import grid_size
from hpm.models.vit import LAYER_NORM_EPS
from hpm.weights import hugging_face
from hpm.weights.contents import Contents

# Width of an attention head in all published models except ViT-H, which is in SIZES.
HEAD_DIM, DECODER_HEAD_DIM = 64, 32


def complete(contents: Contents) -> None:
    """Fill in architecture, normalisation and config of a recognised file.

    Raises UserError where the shapes are not those of a Vision Transformer, or where something
    can neither be derived nor assumed.
    """
    architecture = derive_architecture(contents)
    contents.mean, contents.std = _normalisation(contents, architecture.channels)
    contents.frame_stride = contents.metadata.get("frame_stride")
    target = _target(contents, architecture)
    if target is None:
        contents.architecture = architecture.encoder()
    else:
        contents.architecture = architecture
        contents.config = _config(architecture, target)


def derive_architecture(contents: Contents) -> Architecture:
    """The architecture of these tensors, including decoders if there are any.

    Raises UserError where the shapes are not those of a Vision Transformer.
    """
    known = contents.format
    assert known is not None
    projection = _tensor(contents, "encoder.patch_embed.proj.weight", 2 + known.axes)
    dim, channels, *sides = projection.shape
    patch_size = tuple(sides)
    depth = _count_blocks(contents.student, "encoder.blocks.")
    heads = [s.num_heads for s in SIZES.values() if (s.embed_dim, s.depth) == (dim, depth)]
    architecture = Architecture(
        image_size=_image_size(contents, patch_size),
        patch_size=patch_size,
        channels=channels,
        embed_dim=dim,
        depth=depth,
        num_heads=_heads(contents, "num_heads", dim, heads[0] if heads else dim / HEAD_DIM),
        class_token=known.class_token,
        positions=known.positions,
        final_norm=not known.may_lack_norm or "encoder.norm.weight" in contents.student,
        decoders=_decoders(contents),
    )
    contents.notes.append(_summary(contents, architecture))
    return architecture


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON beside the weights, under our names: config.json (of Hugging Face or timm) with
    preprocessor_config.json, or FILE.json."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    if config.get("model_type") in ("vit", "vit_mae", "videomae"):
        found = hugging_face.read_description(folder, config)
    else:
        found = config.get("pretrained_cfg", {}) if "architecture" in config else {}
    found = {name: value for name, value in found.items() if value is not None}
    return found | (read_json(path.with_suffix(".json")) if path.is_file() else {})


def check_metadata(contents: Contents) -> None:
    """Refuse features that our encoder lacks, and values of the wrong type."""
    path, metadata = contents.path, contents.metadata
    activation = metadata.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{path}: its activation is {activation}; only gelu is supported")
    for name in ("num_heads", "decoder_heads"):
        value = metadata.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {name} cannot be {value!r}")
    stride = metadata.get("frame_stride")
    if stride is not None and (type(stride) is not int or stride < 0):
        raise UserError(f"{path}: frame_stride cannot be {stride!r}")
    size, axes = metadata.get("image_size"), contents.format.axes if contents.format else 2
    if isinstance(size, int) and axes == 2:
        metadata["image_size"] = [size, size]
    elif size is not None and not (_are_numbers(size, axes) and all(type(v) is int for v in size)):
        raise UserError(f"{path}: image_size cannot be {size!r}")
    eps = metadata.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        contents.notes.append(f"layer norms run with eps {LAYER_NORM_EPS:g} instead of {eps:g}")


def square_image(positions: Tensor | None, patch_size: tuple[int, ...]) -> tuple[int, int] | None:
    """The image size in pixels where positions [1 1+N D] are of a class token and a square of
    patches, else None."""
    if positions is None or positions.ndim != 3:
        return None
    side = isqrt(max(positions.shape[1] - 1, 0))
    if side == 0 or side * side + 1 != positions.shape[1]:
        return None
    return side * patch_size[0], side * patch_size[1]


def _decoders(contents: Contents) -> Decoders | None:
    assert contents.format is not None
    if not contents.format.has_decoder:
        return None
    dim = _tensor(contents, "decoder_embed.weight", 2).shape[0]
    depth = _count_blocks(contents.student, "reconstructor.blocks.")
    per_head = DECODER_HEAD_DIM if contents.format.axes == 2 else HEAD_DIM
    heads = _heads(contents, "decoder_heads", dim, dim / per_head)
    predictor = contents.format.has_predictor
    scalar = predictor and len(_tensor(contents, "predictor.head.bias", 1)) == 1
    return Decoders(
        decoder_dim=dim,
        decoder_depth=depth,
        decoder_heads=heads,
        with_predictor=predictor,
        predictor_dim=dim,
        predictor_depth=(
            _count_blocks(contents.student, "predictor.blocks.") if predictor else depth
        ),
        predictor_heads=heads,
        predictor_head="scalar" if scalar else "patch",
        target_dim=len(_tensor(contents, "reconstructor.head.bias", 1)),
    )


def _tensor(contents: Contents, name: str, axes: int) -> Tensor:
    tensor = contents.student.get(name)
    if tensor is None or tensor.ndim != axes or not tensor.numel():
        assert contents.format is not None
        raise UserError(
            f"{contents.path}: {contents.format.description}, but {name} is missing or of another "
            "shape"
        )
    return tensor


def _count_blocks(state: StateDict, prefix: str) -> int:
    """Number of blocks. Gaps are detected when the weights are loaded."""
    names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    return len({name.partition(".")[0] for name in names})


def _image_size(contents: Contents, patch_size: tuple[int, ...]) -> tuple[int, ...]:
    assert contents.format is not None
    count = _tensor(contents, "encoder.pos_embed", 3).shape[1]
    given = contents.metadata.get("image_size")
    if given is not None:
        fits = all(i > 0 and i % p == 0 for i, p in zip(given, patch_size, strict=True))
        prefix = int(contents.format.class_token)
        if not fits or prod(grid_size(given, patch_size)) + prefix != count:
            raise UserError(
                f"{contents.path}: image_size {given} does not match its {count} positions and "
                f"patches of {size_text(patch_size)} pixels"
            )
        return tuple(given)
    size = square_image(contents.student["encoder.pos_embed"], patch_size)
    if size is None:
        raise UserError(
            f"{contents.path}: its {count} positions are not a class token and a square of "
            f"patches: {to_add(contents, 'image_size', '[H, W]')}"
        )
    return size


def _heads(contents: Contents, name: str, dim: int, guess: float) -> int:
    """Number of attention heads: from the JSON, else guessed from the width."""
    heads = contents.metadata.get(name, guess)
    if heads != int(heads) or heads < 1 or dim % int(heads):
        raise UserError(
            f"{contents.path}: the number of attention heads is unknown (width {dim}): "
            f"{to_add(contents, name, 'N')}"
        )
    return int(heads)


def _summary(contents: Contents, found: Architecture) -> str:
    """A line that describes what was derived."""
    sizes = size_text(found.image_size), size_text(found.patch_size)
    parts = [
        f"width {found.embed_dim}",
        counted(found.depth, "block"),
        counted(found.channels, "channel"),
        f"images of {sizes[0]} in patches of {sizes[1]} pixels",
    ]
    heads = [("num_heads", found.num_heads, "")]
    if found.decoders is not None:
        heads.append(("decoder_heads", found.decoders.decoder_heads, " of the decoders"))
    for name, count, whose in heads:
        assumed = "" if name in contents.metadata else " (assumed)"
        parts.append(f"{counted(count or 0, 'head')}{whose}{assumed}")
    return ", ".join(parts)


def _normalisation(contents: Contents, channels: int) -> tuple[list[float], list[float]]:
    mean, std = contents.metadata.get("mean"), contents.metadata.get("std")
    if mean is not None and std is not None:
        if not (_are_numbers(mean, channels) and _are_numbers(std, channels) and min(std) > 0):
            raise UserError(
                f"{contents.path}: mean {mean} and deviation {std} do not fit "
                f"{counted(channels, 'channel')}"
            )
        return list(map(float, mean)), list(map(float, std))
    if channels != len(IMAGENET_MEAN):
        raise UserError(
            f"{contents.path}: the normalisation of its {counted(channels, 'channel')} is "
            f"unknown: {to_add(contents, 'mean', '[...]', 'std', '[...]')}"
        )
    contents.notes.append("images are normalised by ImageNet's mean and deviation (assumed)")
    return list(IMAGENET_MEAN), list(IMAGENET_STD)


def _target(contents: Contents, architecture: Architecture) -> str | None:
    """The target of the reconstructor; None without one, or if it does not predict pixels."""
    decoders = architecture.decoders
    if decoders is None:
        return None
    if decoders.target_dim != prod(architecture.patch_size) * architecture.channels:
        contents.notes.append("its reconstructor predicts no pixels: only the backbone is used")
        return None
    normalised = contents.metadata.get("norm_pix_loss")
    if normalised is None:
        contents.notes.append("its target is normalised pixels (assumed)")
    assert contents.format is not None
    return contents.format.normalized_target if normalised in (None, True) else "pixels"


def _config(architecture: Architecture, target: str) -> PretrainConfig:
    """The options that evaluations and figures read; data and out are unknown."""
    config = PretrainConfig(data="", out="", target=target)
    config.image_size = pair(architecture.image_size[-2:])
    sides = architecture.patch_size
    config.patch_size = pair(sides) if len(sides) == 2 else (sides[0], sides[1], sides[2])
    config.channels = architecture.channels
    config.positions, config.class_token = architecture.positions, architecture.class_token
    if not architecture.need_decoders().with_predictor:
        config.mask, config.predictor_loss = "random", "none"
    if len(sides) == 3:  # as VideoMAE is trained
        config.frames = architecture.image_size[0]
        config.mask, config.mask_ratio = "tube", 0.9
    return config


def to_add(contents: Contents, *items: str) -> str:
    """`add {"num_heads": N} to weights.json`"""
    pairs = zip(items[::2], items[1::2], strict=True)
    content = ", ".join(f'"{name}": {value}' for name, value in pairs)
    return f"add {{{content}}} to {contents.path.with_suffix('.json')}"


def _are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of this many numbers."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(v, (int, float)) and v == v and not isinstance(v, bool) for v in values)
    )

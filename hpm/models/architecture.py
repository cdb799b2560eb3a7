"""The architecture of a model: all numbers that are needed to build it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from hpm.core.choices import TIMM, Positions
from hpm.core.config import PretrainConfig, pair, secondary_mask_ratio
from hpm.core.errors import UserError, counted

PredictorHead = Literal["patch", "scalar"]

TUBE_FRAMES = 2  # of the patches of clips, by default
DEEP = 4  # times the blocks of a standard reconstructor: 32 for ViT-B to ViT-H, as in Pixio


@dataclass(frozen=True)
class ModelSize:
    """Width, depth and heads of the encoder and of both decoders; default patch size in pixels."""

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


@dataclass(frozen=True)
class Decoders:
    """The decoders' part of an architecture: the arguments of `MaskedImageModel` of these names."""

    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    with_predictor: bool
    predictor_dim: int
    predictor_depth: int
    predictor_heads: int
    predictor_head: PredictorHead = "patch"
    detach_predictor: bool = False
    with_cover: bool = False
    target_dim: int | None = None  # values per patch; None: the pixels of a patch


@dataclass(frozen=True)
class Architecture:
    """The architecture of an encoder, and of the decoders of a whole model.

    Sizes are in pixels along each axis: (height, width), or (frames, height, width) for clips.
    """

    # `timm/NAME`, or an encoder of the user's own (see `own_encoder`); None: our own ViT.
    model: str | None = field(default=None, kw_only=True)
    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    channels: int
    embed_dim: int
    depth: int
    num_heads: int | None = None  # None if it differs between blocks (Hiera)
    class_token: bool = True
    class_tokens: int = 1  # of our own ViT, if it has any
    positions: Positions = "sincos"
    final_norm: bool = True  # False for some of other libraries' weights
    decoders: Decoders | None = None  # None for an encoder only

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: object = "architecture") -> Architecture:
        """Read the architecture from the JSON of a checkpoint or backbone file.

        Keys that older files lack take their defaults; unrelated keys are ignored.

        Args:
            content: a flat dictionary, as written by `to_json`.
            source: where the content was read from, for the error message.

        Raises:
            UserError: if a key is missing or a value is invalid.
        """
        model = content.get("model")
        needs_heads = model is None or "num_heads" in content
        return cls(
            model=None if model is None else str(model),
            image_size=_size(content, "image_size", source),
            patch_size=_size(content, "patch_size", source),
            channels=_count(content, "channels", source),
            embed_dim=_count(content, "embed_dim", source),
            depth=_count(content, "depth", source),
            num_heads=_count(content, "num_heads", source) if needs_heads else None,
            class_token=bool(content.get("class_token", True)),
            class_tokens=_count({"class_tokens": 1} | dict(content), "class_tokens", source),
            positions=_positions(content, source),
            final_norm=bool(content.get("final_norm", True)),
            decoders=_decoders(content, source) if "decoder_dim" in content else None,
        )

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary of plain values, as stored in checkpoints and backbone files."""
        content = asdict(self)
        decoders = content.pop("decoders") or {}
        if self.model is None and self.class_token:
            del content["class_token"]  # older files of our own ViT lack it
        for name in ("class_tokens", "positions", "final_norm"):
            if content[name] == getattr(type(self), name):
                del content[name]  # older files lack it
        content |= decoders
        sizes = {name: list(content[name]) for name in ("image_size", "patch_size")}
        return {name: value for name, value in (content | sizes).items() if value is not None}

    def encoder(self) -> Architecture:
        """The architecture without decoders."""
        return replace(self, decoders=None)

    def with_target_dim(self, target_dim: int) -> Architecture:
        """The same model for a target with `target_dim` values per patch."""
        return replace(self, decoders=replace(self.need_decoders(), target_dim=target_dim))

    def need_decoders(self) -> Decoders:
        """The decoders of a whole model. Raises ValueError for an encoder only."""
        if self.decoders is None:
            raise ValueError("this is the architecture of an encoder alone, without decoders")
        return self.decoders


def resolve_model(config: PretrainConfig) -> Architecture:
    """The architecture of a config. Raises UserError if timm's or the user's model cannot be
    used."""
    if config.model not in SIZES:
        named = _timm_encoder if config.model.startswith(TIMM) else _own_encoder
        encoder = named(config)
        size = nearest_size(encoder["embed_dim"])
    else:
        size = SIZES[config.model]
        names = ("patch_size", "embed_dim", "depth", "num_heads")
        encoder = {name: getattr(size, name) for name in names}
        encoder |= {
            name: getattr(config, name) for name in ("positions", "class_token", "class_tokens")
        }
    image_size, patch_size = view_sizes(config, encoder.pop("patch_size"))
    deep = config.decoder == "deep"
    decoders = Decoders(
        decoder_dim=config.decoder_dim or size.decoder_dim,
        decoder_depth=config.decoder_depth or size.decoder_depth * (DEEP if deep else 1),
        decoder_heads=config.decoder_heads or size.decoder_heads,
        with_predictor=config.predictor_loss != "none",
        predictor_dim=config.predictor_dim or config.decoder_dim or size.decoder_dim,
        predictor_depth=(
            config.predictor_depth or (not deep and config.decoder_depth) or size.decoder_depth
        ),
        predictor_heads=config.predictor_heads or config.decoder_heads or size.decoder_heads,
        predictor_head=config.predictor_head,
        detach_predictor=config.predictor_detach,
        with_cover=bool(secondary_mask_ratio(config)),
    )
    return Architecture(
        image_size=image_size,
        patch_size=patch_size,
        channels=config.channels,
        decoders=decoders,
        **encoder,
    )


def view_sizes(
    config: PretrainConfig, patch_size: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(image_size, patch_size) of the model's input: (height, width), or (frames, height, width)
    for clips. patch_size: used if the config has none.

    Raises UserError if patches of images are given frames.
    """
    image_size = pair(config.image_size)
    given = patch_size if config.patch_size is None else config.patch_size
    sides = (given, given) if isinstance(given, int) else tuple(given)
    if config.frames > 1:
        return (config.frames, *image_size), sides if len(sides) == 3 else (TUBE_FRAMES, *sides)
    if len(sides) == 3:
        raise UserError(
            f"patch_size {','.join(map(str, sides))} is of frames, height and width, but frames is "
            "1: pass two numbers, or --frames"
        )
    return image_size, sides


def nearest_size(embed_dim: int) -> ModelSize:
    """Our size of the nearest width, whose decoder settings are used for timm's encoders."""
    return min(SIZES.values(), key=lambda size: abs(size.embed_dim - embed_dim))


def _timm_encoder(config: PretrainConfig) -> dict[str, Any]:
    """The encoder's part of the architecture for timm's model. Raises UserError if it cannot be
    used."""
    from hpm.models.timm_models import timm_shape

    if config.frames > 1:
        raise UserError(
            f"frames is {config.frames}, but {config.model} takes images: pass --model vit_small, "
            "or leave --frames out"
        )
    shape = dict(timm_shape(config.model.removeprefix(TIMM)))
    patch_size = config.patch_size
    if shape.pop("fixed") and patch_size and pair(patch_size) != shape["patch_size"]:
        height, width = shape["patch_size"]
        raise UserError(
            f"patch_size is {patch_size}, but the mask units of {config.model} are of {height} x "
            f"{width} pixels: leave --patch-size out"
        )
    return {"model": config.model} | shape


def _own_encoder(config: PretrainConfig) -> dict[str, Any]:
    """The encoder's part of the architecture for a model of the user's own. Raises UserError if it
    cannot be used."""
    from hpm.models.own_encoder import own_shape

    size, patch_size = view_sizes(config, ModelSize.patch_size)
    check_sizes(size, patch_size)
    known = [*SIZES, f"{TIMM}NAME"]
    shape = own_shape(config.model, size, patch_size, config.channels, known)
    return {"model": config.model, "patch_size": patch_size} | shape


def check_sizes(image_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise UserError unless patches of this size divide an image or clip."""
    if len(image_size) == 3 and (image_size[0] % max(patch_size[0], 1) or patch_size[0] < 1):
        raise UserError(
            f"patches of {counted(patch_size[0], 'frame')} do not divide a clip of {image_size[0]}:"
            f" pass another --frames, or --patch-size {image_size[0]},H,W"
        )
    for image, patch in zip(image_size, patch_size, strict=True):
        if patch < 1 or image < 1:
            raise UserError("image_size and patch_size must be at least 1 pixel")
        if patch > image:
            raise UserError(
                f"image_size {image} is smaller than patch_size {patch}: pass smaller patches"
            )
        if image % patch:
            fitting = max(1, round(image / patch)) * patch
            raise UserError(
                f"patch_size {patch} does not divide image_size {image}: "
                f"the nearest that fits is --image-size {fitting}"
            )


def _decoders(content: Mapping[str, Any], source: object) -> Decoders:
    """Read the decoders' part. The predictor's shape defaults to the reconstructor's."""
    dim, depth, heads = (
        _count(content, f"decoder_{name}", source) for name in ("dim", "depth", "heads")
    )
    predictor = {"predictor_dim": dim, "predictor_depth": depth, "predictor_heads": heads}
    for name in predictor:
        if name in content:
            predictor[name] = _count(content, name, source)
    target_dim = content.get("target_dim")
    head: Any = content.get("predictor_head", "patch")
    if head not in ("patch", "scalar"):
        raise UserError(f"{source}: predictor_head is {head!r}, not patch or scalar")
    return Decoders(
        decoder_dim=dim,
        decoder_depth=depth,
        decoder_heads=heads,
        **predictor,
        with_predictor=bool(_value(content, "with_predictor", source)),
        predictor_head=head,
        detach_predictor=bool(content.get("detach_predictor", False)),
        with_cover=bool(content.get("with_cover", False)),
        target_dim=None if target_dim is None else _count(content, "target_dim", source),
    )


def _positions(content: Mapping[str, Any], source: object) -> Positions:
    value: Any = content.get("positions", "sincos")
    if value not in get_args(Positions):
        raise UserError(f"{source}: positions is {value!r}: use a later version of hpm")
    return value


def _value(content: Mapping[str, Any], name: str, source: object) -> Any:
    if name not in content:
        raise UserError(f"{source}: the architecture lacks {name}: use another file")
    return content[name]


def _count(content: Mapping[str, Any], name: str, source: object) -> int:
    value = _value(content, name, source)
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {name} is {value!r}, not a number above 0")
    return value


def _size(content: Mapping[str, Any], name: str, source: object) -> tuple[int, ...]:
    value = _value(content, name, source)
    if not isinstance(value, (list, tuple)) or not all(type(v) is int and v > 0 for v in value):
        raise UserError(f"{source}: {name} is {value!r}, not pixels along each axis")
    return tuple(value)

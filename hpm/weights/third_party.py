"""Weights of others, recognised by their names: Hard Patches Mining as published, MAE, timm's ViT,
Hugging Face's ViT and ViTMAE.

The architecture follows from the shapes of the tensors. What shapes do not tell (attention heads,
how images were normalised, the target) is looked for in a JSON file beside the weights, is else
assumed, and is always said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt, prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.core.files import TORCH_SUFFIXES, State, read_tensors, read_torch_file
from hpm.core.hub import fetched, read_json
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD
from hpm.models.architecture import SIZES
from hpm.models.build import build_encoder, build_model
from hpm.models.encoder import Encoder
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import grid_size, interpolate_positions, resample_projection
from hpm.models.timm_encoder import pretrained_weights
from hpm.models.timm_models import PREFIX, check_weights, timm_input, timm_shape
from hpm.models.vit import LAYER_NORM_EPS, VisionTransformer
from hpm.weights.checkpoint import compare, differ, load_checkpoint, load_initial
from hpm.weights.names import ABOUT, Kind, recognise, to_ours

Built = TypeVar("Built", bound=nn.Module)
STUDENT = ("state_dict", "model", "")  # in this order; "" is the file itself
TEACHER = ("ema_state_dict", "state_dict_ema", "model_ema")
PARTS = ("encoder.", "decoder_embed.", "mask_token", "decoder_pos_embed", "reconstructor.")
HEAD_DIM, DECODER_HEAD_DIM = 64, 32  # of all published models but ViT-H, which is among SIZES


@dataclass
class Weights:
    """What a file holds, under our names.

    unused: names, the file's, of tensors that we have no use for. about: the JSON beside it.
    notes: a line each on what was found and what was assumed.
    """

    path: Path
    kind: Kind
    student: State
    teacher: State | None
    unused: list[str]
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def has_decoder(self) -> bool:
        return self.kind in ("hpm", "mae", "hf_mae")


@dataclass
class Imported:
    """Models built from a file; no model and teacher where it is a backbone alone."""

    architecture: dict[str, Any]
    mean: list[float]
    std: list[float]
    encoder: Encoder
    model: MaskedImageModel | None
    teacher: MaskedImageModel | None
    config: PretrainConfig | None
    notes: list[str]


def import_model(path: Path) -> Imported:
    """Build what a file of others (or a folder of Hugging Face's) holds. Raises UserError."""
    weights = read_weights(path)
    architecture = derive_architecture(weights)
    mean, std = _normalisation(weights, architecture["channels"])
    target = _target(weights, architecture)
    if target is None:
        state = _of_encoder(weights.student)
        encoder = _filled(lambda: build_encoder(architecture), state, path)
        return Imported(architecture, mean, std, encoder, None, None, None, weights.notes)
    model = _filled(lambda: build_model(architecture), weights.student, path)
    if weights.teacher is not None:
        teacher = _filled(lambda: build_model(architecture), weights.teacher, path)
    else:
        teacher = copy.deepcopy(model)
        weights.notes.append("no teacher in the file: the student stands in for it")
    config = _config(architecture, target)
    return Imported(architecture, mean, std, model.encoder, model, teacher, config, weights.notes)


def import_timm(name: str) -> Imported:
    """timm's own weights of `timm/NAME`, for images as they were trained on.

    Raises UserError where timm has none, or they are not on the disk and cannot be fetched.
    """
    model = name.removeprefix(PREFIX)
    shape = {key: value for key, value in timm_shape(model).items() if key != "fixed"}
    check_weights(model)
    wanted = timm_input(model)
    architecture = {"model": name} | shape
    architecture |= {"image_size": list(wanted.image_size), "channels": wanted.channels}
    architecture["patch_size"] = list(shape["patch_size"])
    encoder: Any = build_encoder(architecture, seed=0)
    encoder.load_state_dict(fetched(name, "timm", lambda: pretrained_weights(encoder)))
    note = (
        f"{name}: timm's pretrained weights, for images of {_by(wanted.image_size)} pixels "
        f"normalised by mean {wanted.mean} and deviation {wanted.std}"
    )
    return Imported(architecture, wanted.mean, wanted.std, encoder, None, None, None, [note])


def initialise(model: MaskedImageModel, path: Path, partial: bool, teacher: bool = False) -> str:
    """Start a model from a run's file or one of others; what was done, in words.

    Positions and patch projection are resampled where the model's image or patch size is another.
    Raises UserError where the file does not fit, or fits in part and `partial` is not asked for.
    """
    ours = isinstance(model.encoder, VisionTransformer)
    state, shape, unused, notes = _initial_weights(path, teacher, ours)
    if isinstance(model.encoder, VisionTransformer) and "encoder.patch_embed.proj.weight" in state:
        block: Any = model.encoder.blocks[0]
        heads = block.attn.num_heads
        if shape.get("num_heads", heads) != heads:
            raise UserError(
                f"init: {path} has {counted(shape['num_heads'], 'attention head')}, but the "
                f"model {heads}: name the --model that it is of"
            )
        try:
            state, resampled = fit(state, model.encoder, shape.get("image_size"))
        except ValueError as error:
            raise UserError(f"init: {path}: {error}") from None
        notes += resampled
    return "; ".join(["init: " + load_initial(model, state, path, partial, unused), *notes])


def read_weights(path: Path) -> Weights:
    """Read and recognise a file, or a folder written by `save_pretrained`. Raises UserError."""
    return _understand(path, _read_states(path))


def derive_architecture(weights: Weights) -> dict[str, Any]:
    """What `build_encoder`, or `build_model` where there are decoders, builds it from.

    Raises UserError where the shapes are not those of a Vision Transformer.
    """
    state, about = weights.student, weights.about
    projection = _tensor(weights, "encoder.patch_embed.proj.weight", 4)
    dim, channels = projection.shape[:2]
    patch_size = tuple(projection.shape[2:])
    depth = _depth(state, "encoder.blocks.")
    shape: dict[str, Any] = {
        "image_size": list(_image_size(weights, patch_size)),
        "patch_size": list(patch_size),
        "channels": channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": _heads(weights, "num_heads", dim, depth),
    }
    if weights.has_decoder:
        decoder_dim = _tensor(weights, "decoder_embed.weight", 2).shape[0]
        shape |= {
            "decoder_dim": decoder_dim,
            "decoder_depth": _depth(state, "reconstructor.blocks."),
            "decoder_heads": _decoder_heads(weights, decoder_dim),
            "target_dim": len(_tensor(weights, "reconstructor.head.bias", 1)),
            "with_predictor": weights.kind == "hpm",
        }
        if weights.kind == "hpm":
            scalar = len(_tensor(weights, "predictor.head.bias", 1)) == 1
            shape["predictor_depth"] = _depth(state, "predictor.blocks.")
            shape["predictor_head"] = "scalar" if scalar else "patch"
    _mention(weights, shape, about)
    return shape


def fit(
    state: State, encoder: VisionTransformer, image_size: Sequence[int] | None
) -> tuple[State, list[str]]:
    """The weights for the encoder's grid and patch size, and what was done.

    image_size: of the weights; a square is assumed where it is not known.
    """
    notes: list[str] = []
    state = dict(state)
    projection = state["encoder.patch_embed.proj.weight"]
    if projection.ndim != 4:
        return state, notes
    before = (projection.shape[2], projection.shape[3])
    size = image_size or _square(state.get("encoder.pos_embed"), before)
    if size is None:
        return state, notes
    grid = grid_size(size, before)
    for name in ("encoder.pos_embed", "decoder_pos_embed"):
        positions = state.get(name)
        if positions is None or grid == encoder.grid or positions.ndim != 3:
            continue
        if positions.shape[1] == prod(grid) + 1:
            state[name] = interpolate_positions(positions, grid, encoder.grid)
            notes.append(f"{name} resampled from {_by(grid)} to {_by(encoder.grid)} patches")
    if before != encoder.patch_size:
        state["encoder.patch_embed.proj.weight"] = resample_projection(
            projection, encoder.patch_size
        )
        notes.append(
            f"patch projection resampled from {_by(before)} to {_by(encoder.patch_size)} pixels"
        )
    return state, notes


def _initial_weights(
    path: Path, teacher: bool, ours: bool
) -> tuple[State, dict[str, Any], list[str], list[str]]:
    """(weights under our names, what is known of their shape, what is left over, notes)."""
    lacking = UserError(f"init: {path} holds no teacher: leave --init-teacher out")
    if path.is_dir() or path.suffix in TORCH_SUFFIXES:
        meta: dict[str, Any] = {}
    else:
        state, meta = read_tensors(path)
    if "step" in meta:
        checkpoint = load_checkpoint(path)
        weights = checkpoint.teacher if teacher else checkpoint.model
        return weights, meta["architecture"], [], []
    if meta.get("kind") == "hpm encoder":
        if teacher:
            raise lacking
        return {f"encoder.{name}": tensor for name, tensor in state.items()}, meta, [], []
    states = _read_states(path)
    if not teacher and (not ours or recognise(_student(states)) is None):
        return _student(states), {}, [], []  # under the model's own names, or it will be refused
    found = _understand(path, states)
    if teacher and found.teacher is None:
        raise lacking
    known = ("num_heads", "image_size")
    shape: dict[str, Any] = {n: found.about[n] for n in known if n in found.about}
    weights = found.teacher if teacher and found.teacher else found.student
    return weights, shape, found.unused, [found.notes[0]]


def _understand(path: Path, states: dict[str, State]) -> Weights:
    teacher_keys = [key for key in TEACHER if key in states]
    found = _student(states)
    kind = recognise(found)
    if kind is None:
        known = "; ".join(ABOUT.values())
        raise UserError(
            f"{path}: not a checkpoint of hpm pretrain, nor {known} (its tensors are named "
            f"{', '.join(list(found)[:3])} ...)"
        )
    student, unused = to_ours(kind, found)
    teacher = to_ours(kind, states[teacher_keys[0]])[0] if teacher_keys else None
    strangers = [name for name in student if not name.startswith((*PARTS, "predictor."))]
    if strangers:
        raise UserError(
            f"{path}: {ABOUT[kind]}, but of another architecture: it has {strangers[0]}, which a "
            "plain Vision Transformer with a class token has not"
        )
    weights = Weights(path, kind, student, teacher, unused, _read_about(path))
    used = len(found) - len(unused)
    weights.notes.append(f"{path}: {ABOUT[kind]}; {used} of its {len(found)} tensors are used")
    if unused:
        weights.notes.append(f"left over: {', '.join(unused[:5])}{' ...' * (len(unused) > 5)}")
    _check_about(weights)
    return weights


def _student(states: dict[str, State]) -> State:
    """The student's, or else whatever there is."""
    return next(states[key] for key in (*STUDENT, *TEACHER, *states) if key in states)


def _read_states(path: Path) -> dict[str, State]:
    """The state dicts of a file under their keys, or that of a folder under ""."""
    if not path.is_dir():
        return read_torch_file(path) if path.suffix in TORCH_SUFFIXES else {"": _plain(path)}
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{path}: holds no model.safetensors and no pytorch_model.bin")
    return {"": {name: tensor for file in files for name, tensor in _plain(file).items()}}


def _plain(path: Path) -> State:
    return read_tensors(path)[0]


def _read_about(path: Path) -> dict[str, Any]:
    """The JSON beside the weights: config.json (of Hugging Face or timm) with
    preprocessor_config.json, or FILE.json with our own names, which these are put into."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("vit", "vit_mae"):
        about = config.get("pretrained_cfg", {}) if "architecture" in config else {}
    else:
        names = {
            "num_attention_heads": "num_heads",
            "decoder_num_attention_heads": "decoder_heads",
            "image_size": "image_size",
            "hidden_act": "hidden_act",
            "layer_norm_eps": "layer_norm_eps",
            "norm_pix_loss": "norm_pix_loss",
        }
        about = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
        moments = read_json(folder / "preprocessor_config.json")
        about |= {n: moments[f"image_{n}"] for n in ("mean", "std") if f"image_{n}" in moments}
    about = {name: value for name, value in about.items() if value is not None}
    return about | (read_json(path.with_suffix(".json")) if path.is_file() else {})


def _check_about(weights: Weights) -> None:
    """Refuse what our encoder does not do, and values of the wrong type."""
    about = weights.about
    activation = about.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{weights.path}: its activation is {activation}, ours is gelu")
    for name in ("num_heads", "decoder_heads"):
        value = about.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{weights.path}: {name} cannot be {value!r}")
    size = about.get("image_size")
    if isinstance(size, int):
        about["image_size"] = [size, size]
    elif size is not None and not (_numbers(size, 2) and all(type(v) is int for v in size)):
        raise UserError(f"{weights.path}: image_size cannot be {size!r}")
    eps = about.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        weights.notes.append(f"layer norms run with eps {LAYER_NORM_EPS:g} instead of {eps:g}")


def _tensor(weights: Weights, name: str, axes: int) -> Tensor:
    tensor = weights.student.get(name)
    if tensor is None or tensor.ndim != axes or not tensor.numel():
        raise UserError(
            f"{weights.path}: {ABOUT[weights.kind]}, but {name} is missing or has no such shape"
        )
    return tensor


def _depth(state: State, prefix: str) -> int:
    """How many blocks there are; gaps are found when the weights are loaded."""
    starts = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    return len({name.partition(".")[0] for name in starts})


def _image_size(weights: Weights, patch_size: tuple[int, ...]) -> tuple[int, int]:
    positions = _tensor(weights, "encoder.pos_embed", 3)
    given = weights.about.get("image_size")
    if given is not None:
        fits = all(i > 0 and i % p == 0 for i, p in zip(given, patch_size, strict=True))
        if not fits or prod(grid_size(given, patch_size)) + 1 != positions.shape[1]:
            raise UserError(
                f"{weights.path}: image_size {given} does not go with its {positions.shape[1]} "
                f"positions and patches of {_by(patch_size)} pixels"
            )
        return given[0], given[1]
    size = _square(positions, patch_size)
    if size is None:
        raise UserError(
            f"{weights.path}: its {positions.shape[1]} positions are not those of a class token "
            f'and a square; say so in {weights.path.with_suffix(".json")}: {{"image_size": [H, W]}}'
        )
    return size


def _square(positions: Tensor | None, patch_size: tuple[int, ...]) -> tuple[int, int] | None:
    if positions is None or positions.ndim != 3:
        return None
    side = isqrt(max(positions.shape[1] - 1, 0))
    if side == 0 or side * side + 1 != positions.shape[1]:
        return None
    return side * patch_size[0], side * patch_size[1]


def _heads(weights: Weights, name: str, dim: int, depth: int) -> int:
    """Attention heads of the encoder: as the JSON says, as a known size has, or one per 64."""
    known = [s.num_heads for s in SIZES.values() if (s.embed_dim, s.depth) == (dim, depth)]
    return _checked_heads(weights, name, dim, known[0] if known else dim / HEAD_DIM)


def _decoder_heads(weights: Weights, dim: int) -> int:
    return _checked_heads(weights, "decoder_heads", dim, dim / DECODER_HEAD_DIM)


def _checked_heads(weights: Weights, name: str, dim: int, guess: float) -> int:
    heads = weights.about.get(name, guess)
    if heads != int(heads) or heads < 1 or dim % int(heads):
        raise UserError(
            f"{weights.path}: how many attention heads share its width of {dim} cannot be told; "
            f'say so in {weights.path.with_suffix(".json")}: {{"{name}": N}}'
        )
    return int(heads)


def _mention(weights: Weights, shape: dict[str, Any], about: dict[str, Any]) -> None:
    found = f"width {shape['embed_dim']}, {counted(shape['depth'], 'block')}, "
    found += f"{counted(shape['channels'], 'channel')}, "
    found += f"images of {_by(shape['image_size'])} in patches of {_by(shape['patch_size'])} pixels"
    for name, whose in (("num_heads", ""), ("decoder_heads", " of the decoders")):
        if name in shape:
            assumed = "" if name in about else " (assumed)"
            found += f", {counted(shape[name], 'head')}{whose}{assumed}"
    weights.notes.append(found)


def _normalisation(weights: Weights, channels: int) -> tuple[list[float], list[float]]:
    mean, std = weights.about.get("mean"), weights.about.get("std")
    if mean is not None and std is not None:
        if not (_numbers(mean, channels) and _numbers(std, channels) and min(std) > 0):
            raise UserError(
                f"{weights.path}: mean {mean} and deviation {std} do not fit "
                f"{counted(channels, 'channel')}"
            )
        return list(map(float, mean)), list(map(float, std))
    if channels != len(IMAGENET_MEAN):
        raise UserError(
            f"{weights.path}: how images of {counted(channels, 'channel')} were "
            f"normalised cannot be told; say so in "
            f'{weights.path.with_suffix(".json")}: {{"mean": [...], "std": [...]}}'
        )
    weights.notes.append("images are normalised by ImageNet's mean and deviation (assumed)")
    return list(IMAGENET_MEAN), list(IMAGENET_STD)


def _target(weights: Weights, shape: dict[str, Any]) -> str | None:
    """Of the reconstructor; None where there is none that can be used."""
    if not weights.has_decoder:
        return None
    if shape["target_dim"] != prod(shape["patch_size"]) * shape["channels"]:
        weights.notes.append("its reconstructor predicts no pixels: the backbone alone is used")
        return None
    given = weights.about.get("norm_pix_loss")
    if given is None:
        weights.notes.append("its target is normalised pixels (assumed)")
    return "normalized_pixels" if given in (None, True) else "pixels"


def _config(shape: dict[str, Any], target: str) -> PretrainConfig:
    """As far as measures and figures ask for it; data and out are nobody's."""
    config = PretrainConfig(data="", out="")
    config.image_size, config.patch_size = tuple(shape["image_size"]), tuple(shape["patch_size"])
    config.channels = shape["channels"]
    config.target = "pixels" if target == "pixels" else "normalized_pixels"
    if not shape["with_predictor"]:
        config.mask, config.predictor_loss = "random", "none"
    return config


def _filled(make: Callable[[], Built], state: State, path: Path) -> Built:
    """A module with these weights. UserError names the first that is missing or of another shape.

    Nothing is allocated before they have been compared: names alone may claim any number of blocks.
    """
    try:
        with torch.device("meta"):
            module = make()
    except ValueError as error:
        raise UserError(f"{path}: of another architecture ({error})") from None
    problems = compare(module, state)
    if problems:
        raise UserError(f"{path}: of another architecture ({problems[0]}; {differ(problems)})")
    whole = {name: tensor.float().contiguous() for name, tensor in state.items()}
    module.load_state_dict(whole, assign=True)
    return module


def _of_encoder(state: State) -> State:
    prefix = "encoder."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _numbers(values: Any, count: int) -> bool:
    """Whether it is a list of so many numbers."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(v, (int, float)) and v == v and not isinstance(v, bool) for v in values)
    )


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))

"""Initialise a model from other weights (`--init`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm.core.errors import UserError, counted, size_text
from hpm.core.files import StateDict
from hpm.models.architecture import Architecture
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import Size, grid_size, interpolate_positions, resample_projection
from hpm.models.vit import VisionTransformer
from hpm.weights.contents import Contents
from hpm.weights.resolve import require_recognised, resolve
from hpm.weights.shapes import square_image


def initialise(
    model: MaskedImageModel, path: str | Path, partial: bool, teacher: bool = False
) -> str:
    """Load our own or another library's weights into a model. Returns a line for the log.

    Positions and patch projection are resampled to the model's image and patch size.

    Args:
        path: see `resolve`.
        partial: accept weights for only a part of the model.
        teacher: load the teacher's weights.

    Raises:
        UserError: if the file does not match, or matches in part without `partial`.
    """
    contents, state = _read(path, isinstance(model.encoder, VisionTransformer), teacher)
    notes = contents.notes[:1]
    if isinstance(model.encoder, VisionTransformer) and "encoder.patch_embed.proj.weight" in state:
        num_heads, image_size = _known_shape(contents)
        _check_heads(model.encoder, num_heads, contents.path)
        try:
            state, resampled = resample(state, model, image_size)
        except ValueError as error:
            raise UserError(f"init: {contents.path}: {error}") from None
        notes += resampled
    summary = load_initial(model, state, contents.path, partial, contents.unused)
    return "; ".join([f"init: {summary}", *notes])


def lacks_decoder(architecture: Architecture, path: str | Path, teacher: bool = False) -> bool:
    """Whether a model that is initialised from these weights has a decoder that is not among them.

    Args: see `initialise`. Raises UserError if there is no such file, or it cannot be read.
    """
    _, state = _read(path, architecture.model is None, teacher)
    decoders = architecture.need_decoders()
    widths = {"reconstructor": decoders.decoder_dim}
    if decoders.with_predictor:
        widths["predictor"] = decoders.predictor_dim
    first = {name: state.get(f"{name}.blocks.0.norm1.weight") for name in widths}
    return any(
        norm is None or len(norm) != widths[name]  # another width is not loaded
        for name, norm in first.items()
    )


def _read(path: str | Path, ours: bool, teacher: bool) -> tuple[Contents, StateDict]:
    """(contents, the student's or the teacher's tensors). ours: the encoder is not timm's or the
    user's, which have names of their own, so that those of the file are not converted."""
    contents = resolve(path, convert=ours or teacher)
    if not teacher:
        return contents, contents.student
    require_recognised(contents)
    if contents.teacher is None:
        raise UserError(f"init: {contents.path} holds no teacher: leave --init-teacher out")
    return contents, contents.teacher


def load_initial(
    model: MaskedImageModel, state: StateDict, path: Path, partial: bool, unused: Sequence[str] = ()
) -> str:
    """Load the matching tensors. Returns a line that says how many matched.

    Names without the prefix `encoder.` are taken for those of an encoder.

    unused: names of further tensors in the file, to report as unused.

    Raises UserError if none of the encoder match, or if some are missing and `partial` is False.
    """
    own = model.state_dict()
    if "encoder.patch_embed.proj.weight" in own and "patch_embed.proj.weight" in state:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    matching = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    summary = f"{len(matching)} of {counted(len(own), 'tensor')} matched {path} "
    summary += f"({_by_part(own, matching)})"
    left = [*unused, *[name for name in state if name not in matching]]
    summary += f", {len(left)} left over: {_first_names(left)}" if left else ""
    if not matching:
        raise UserError(f"init: {summary}; it holds no weights of such a model")
    if len(matching) < len(own):
        missing = [n for n in own if n not in matching]
        summary += f", {len(missing)} not, the first {missing[0]}"
        if not any(name.startswith("encoder.") for name in matching):
            raise UserError(
                f"init: no weights of the encoder in {path} have the sizes of this model's: pass "
                f"the --model that they are of ({len(matching)} of "
                f"{counted(len(own), 'tensor')} match)"
            )
        if not partial:
            raise UserError(f"init: {summary}; pass --init-partial to start from those alone")
    model.load_state_dict(matching, strict=False)
    return summary


def _by_part(own: StateDict, matching: StateDict) -> str:
    """Number of matching tensors in each part: `encoder 52 of 52, predictor none of 16`."""
    counts: dict[str, list[int]] = {}
    for name in own:
        count = counts.setdefault(name.partition(".")[0], [0, 0])
        count[0] += name in matching
        count[1] += 1
    return ", ".join(f"{part} {n or 'none'} of {total}" for part, (n, total) in counts.items())


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def resample(
    state: StateDict, model: MaskedImageModel, image_size: Sequence[int] | None
) -> tuple[StateDict, list[str]]:
    """Resample positions and patch projection to the model's grid and patch size. Weights of images
    are extended to clips. Returns the weights and a note for each change.

    image_size: of the weights. None: assume a square.

    Raises ValueError if the weights are of clips, but the model is of images.
    """
    encoder = model.encoder
    assert isinstance(encoder, VisionTransformer)
    notes: list[str] = []
    state = dict(state)
    projection = state["encoder.patch_embed.proj.weight"]
    before = tuple(projection.shape[2:])
    if len(before) > len(encoder.patch_size):
        raise ValueError("it is of clips: pass --frames")
    size = image_size or square_image(state.get("encoder.pos_embed"), before)
    if len(before) not in (2, 3) or size is None:
        return state, notes
    grid = grid_size(size, before)
    prefixes = (0, 1, encoder.num_class_tokens)
    fixed = {"encoder.pos_embed": encoder.pos_embed, "decoder_pos_embed": model.decoder_pos_embed}
    for name, own in fixed.items():
        positions = state.get(name)
        assert own is not None
        if positions is None or positions.ndim != 3:
            continue
        if encoder.positions == "sincos_1d":
            state[name] = own.detach()
        elif grid != encoder.grid and positions.shape[1] - prod(grid) in prefixes:
            state[name] = _extend(positions, grid, encoder.grid, own.detach())
            notes.append(
                f"{name} resampled from {size_text(grid)} to {size_text(encoder.grid)} patches"
            )
        patches = prod(encoder.grid)
        if own.shape[1] != state[name].shape[1] in (patches, patches + 1):
            # Those of weights with another number of class tokens, none or one.
            state[name] = torch.cat([own.detach()[:, :-patches], state[name][:, -patches:]], dim=1)
    notes += _more_class_tokens(state, encoder)
    if before != encoder.patch_size:
        state["encoder.patch_embed.proj.weight"] = resample_projection(
            projection, encoder.patch_size
        )
        sizes = f"{size_text(before)} to {size_text(encoder.patch_size)}"
        notes.append(f"patch projection resampled from {sizes} pixels")
    if len(before) < len(encoder.patch_size):
        state |= _repeated_heads(state, model)
    return state, notes


def _more_class_tokens(state: StateDict, encoder: VisionTransformer) -> list[str]:
    """Take one class token of the weights as the first of several. Returns a note if it does."""
    name, own = "encoder.cls_token", encoder.cls_token
    if own is None or name not in state or state[name].shape[1] != 1 or own.shape[1] == 1:
        return []
    state[name] = torch.cat([state[name], own.detach()[:, 1:].to(state[name])], dim=1)
    return [f"{counted(own.shape[1] - 1, 'class token')} new"]


def _extend(positions: Tensor, grid: Size, new_grid: Size, fixed: Tensor) -> Tensor:
    """Interpolate positions to another grid. Those of an image are repeated over time, and the
    sines and cosines of time are added as they differ from their mean over time, so that the tokens
    of a clip without motion are those of the image on average.

    fixed: the fixed positions of the new grid.
    """
    extended = interpolate_positions(positions, grid, new_grid)
    if len(grid) == len(new_grid):
        return extended
    of_patches = fixed[:, -prod(new_grid) :].unflatten(1, new_grid)
    of_time = (of_patches - of_patches.mean(1, keepdim=True)).flatten(1, -2)
    first = extended.shape[1] - prod(new_grid)
    return torch.cat([extended[:, :first], extended[:, first:] + of_time], dim=1)


def _repeated_heads(state: StateDict, model: MaskedImageModel) -> StateDict:
    """The heads that give the pixels of a patch, repeated for every frame of a tube."""
    own, frames = model.state_dict(), model.encoder.patch_size[0]
    repeated = {}
    for name in ("reconstructor.head", "predictor.head"):
        for part in (f"{name}.weight", f"{name}.bias"):
            head = state.get(part)
            if head is not None and part in own and len(own[part]) == frames * len(head):
                repeated[part] = head.repeat(frames, *(1,) * (head.ndim - 1))
    return repeated


def _known_shape(contents: Contents) -> tuple[int | None, Sequence[int] | None]:
    """(attention heads, image size) of the weights; None if the file and its JSON lack them."""
    if contents.architecture is not None:
        return contents.architecture.num_heads, contents.architecture.image_size
    return contents.metadata.get("num_heads"), contents.metadata.get("image_size")


def _check_heads(encoder: VisionTransformer, num_heads: int | None, path: Path) -> None:
    block: Any = encoder.blocks[0]
    if num_heads not in (None, block.attn.num_heads):
        raise UserError(
            f"init: {path} has {counted(num_heads or 0, 'attention head')}, but the model "
            f"{block.attn.num_heads}: pass the --model that the weights are of"
        )

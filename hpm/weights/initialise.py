"""Initialise a model from other weights (`--init`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from hpm.core.errors import UserError, counted
from hpm.core.files import StateDict
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import grid_size, interpolate_positions, resample_projection
from hpm.models.vit import VisionTransformer
from hpm.weights.contents import Contents, size_text
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
    # timm's encoders have timm's tensor names, so those of the file are not converted.
    ours = isinstance(model.encoder, VisionTransformer)
    contents = resolve(path, convert=ours or teacher)
    state, notes = contents.student, contents.notes[:1]
    if teacher:
        require_recognised(contents)
        if contents.teacher is None:
            raise UserError(f"init: {contents.path} holds no teacher: leave --init-teacher out")
        state = contents.teacher
    if isinstance(model.encoder, VisionTransformer) and "encoder.patch_embed.proj.weight" in state:
        num_heads, image_size = _known_shape(contents)
        _check_heads(model.encoder, num_heads, contents.path)
        try:
            state, resampled = resample(state, model.encoder, image_size)
        except ValueError as error:
            raise UserError(f"init: {contents.path}: {error}") from None
        notes += resampled
    summary = load_initial(model, state, contents.path, partial, contents.unused)
    return "; ".join([f"init: {summary}", *notes])


def load_initial(
    model: MaskedImageModel, state: StateDict, path: Path, partial: bool, unused: Sequence[str] = ()
) -> str:
    """Load the matching tensors. Returns a line that says how many matched.

    Names without the prefix `encoder.` are taken for those of an encoder.

    unused: names of further tensors in the file, to report as unused.

    Raises UserError if none match, or if some are missing and `partial` is False.
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
    state: StateDict, encoder: VisionTransformer, image_size: Sequence[int] | None
) -> tuple[StateDict, list[str]]:
    """Resample positions and patch projection to the encoder's grid and patch size. Returns the
    weights and a note for each change.

    image_size: of the weights. None: assume a square.
    """
    notes: list[str] = []
    state = dict(state)
    projection = state["encoder.patch_embed.proj.weight"]
    if projection.ndim != 4:
        return state, notes
    before = (projection.shape[2], projection.shape[3])
    size = image_size or square_image(state.get("encoder.pos_embed"), before)
    if size is None:
        return state, notes
    grid = grid_size(size, before)
    for name in ("encoder.pos_embed", "decoder_pos_embed"):
        positions = state.get(name)
        if positions is None or grid == encoder.grid or positions.ndim != 3:
            continue
        if positions.shape[1] == prod(grid) + 1:
            state[name] = interpolate_positions(positions, grid, encoder.grid)
            notes.append(
                f"{name} resampled from {size_text(grid)} to {size_text(encoder.grid)} patches"
            )
    if before != encoder.patch_size:
        state["encoder.patch_embed.proj.weight"] = resample_projection(
            projection, encoder.patch_size
        )
        sizes = f"{size_text(before)} to {size_text(encoder.patch_size)}"
        notes.append(f"patch projection resampled from {sizes} pixels")
    return state, notes


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

"""Recognise and load weights: ours or another library's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpm.core.choices import TIMM
from hpm.core.errors import UserError
from hpm.core.files import META_FILE, TORCH_SUFFIXES, StateDict, read_tensors, read_torch_file
from hpm.core.options import AnyPath
from hpm.core.random_state import random_state_kept
from hpm.weights.backbone import Backbone
from hpm.weights.checkpoint import read_checkpoint
from hpm.weights.contents import Contents, ReadableFormat
from hpm.weights.formats import READABLE
from hpm.weights.own import read_own, save_backbone
from hpm.weights.renaming import unwrap
from hpm.weights.run_folder import RunFolder
from hpm.weights.shapes import check_metadata, complete, read_metadata
from hpm.weights.timm import pretrained
from hpm.weights.trained import Trained, build

__all__ = ["Backbone", "Trained", "load", "load_encoder", "resolve", "save_backbone"]

# Keys of state dicts in a PyTorch file, in order of preference; "" is the top level.
STUDENT_KEYS = ("state_dict", "model", "")
TEACHER_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema")
# Prefixes of tensor names in a plain Vision Transformer with decoders.
KNOWN_PARTS = (
    "encoder.",
    "decoder_embed.",
    "mask_token",
    "decoder_pos_embed",
    "reconstructor.",
    "predictor.",
)


def load_encoder(
    path: AnyPath,
    pool: str = "mean",
    teacher: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> Backbone:
    """The encoder of a run folder, a checkpoint or a backbone file, in evaluation mode.

    image_size: (height, width) in pixels. If it differs from that of training, positions are
    interpolated. Raises UserError if the path has no encoder, or the size does not match.
    """
    with random_state_kept():
        return load(os.fspath(path)).backbone(pool, teacher, image_size).eval()


def load(path: str | Path) -> Trained:
    """Build the encoder, and the whole model if there is one, from a path (see `resolve`).

    Raises UserError if the file is not recognised, or its tensors do not match.
    """
    contents = resolve(path)
    require_recognised(contents)
    if contents.architecture is None:
        complete(contents)
    return build(contents)


def resolve(path: str | Path, convert: bool = True) -> Contents:
    """Read weights, and recognise their format.

    Args:
        path: a run folder (its latest checkpoint, or else its backbone), a checkpoint, a backbone,
            a file in one of the formats of `READABLE`, a folder of Hugging Face's, or `timm/NAME`
            for timm's own weights.
        convert: rename another library's tensors to ours.

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    name, path = str(path), Path(path).expanduser()
    if not path.exists():
        if name.startswith(TIMM):
            return pretrained(name)
        raise UserError(f"{path}: no such {'file' if path.suffix else 'run folder or file'}")
    if path.is_dir() and (path / META_FILE).exists():
        contents = read_own(path, *read_checkpoint(path))
        assert contents is not None, "checkpoints have a step"
        return contents
    if path.is_dir() and not (path / "config.json").exists():
        run = RunFolder(path)
        file = run.latest_checkpoint() or (run.backbone if run.backbone.exists() else None)
        if file is None:
            raise UserError(
                f"{path}: holds no checkpoint and no backbone.safetensors: name a "
                "run folder of hpm pretrain, or a file of weights"
            )
        contents = resolve(file)
        contents.name, contents.folder = str(path), path
        return contents
    if path.is_dir() or path.suffix in TORCH_SUFFIXES:
        return other_library(path, read_states(path), convert)
    tensors, metadata = read_tensors(path)
    return read_own(path, tensors, metadata) or other_library(path, {"": tensors}, convert)


def recognise(names: Iterable[str]) -> ReadableFormat | None:
    """The format with these tensor names, or None."""
    bare = {unwrap(name) for name in names}
    return next((known for known in READABLE if known.matches(bare)), None)


def require_recognised(contents: Contents) -> None:
    """Raise UserError, listing the known formats, if a file was not recognised."""
    if not contents.recognised:
        known = "; ".join(known.description for known in READABLE)
        raise UserError(
            f"{contents.path}: not a checkpoint of hpm pretrain, nor {known} (its tensors are "
            f"named {', '.join(list(contents.student)[:3])} ...)"
        )


def other_library(path: Path, states: dict[str, StateDict], convert: bool = True) -> Contents:
    """The contents of another library's file, with our tensor names if it is recognised.

    states: what `read_states` found in it. Raises UserError if it is of another architecture.
    """
    found = next(states[key] for key in (*STUDENT_KEYS, *TEACHER_KEYS, *states) if key in states)
    known = recognise(found) if convert else None
    if known is None:
        return Contents(str(path), path, found)
    student, unused = known.to_ours(found)
    unknown = [name for name in student if not name.startswith(KNOWN_PARTS)]
    if unknown:
        raise UserError(
            f"{path}: {known.description}, but of another architecture: it has {unknown[0]}, "
            "which a plain Vision Transformer does not have"
        )
    teacher_key = next((key for key in TEACHER_KEYS if key in states), None)
    contents = Contents(
        str(path),
        path,
        student,
        known.to_ours(states[teacher_key])[0] if teacher_key else None,
        format=known,
        unused=unused,
        metadata=read_metadata(path),
    )
    used = len(found) - len(unused)
    contents.notes.append(
        f"{path}: {known.description}; {used} of its {len(found)} tensors are used"
    )
    if unused:
        contents.notes.append(f"left over: {', '.join(unused[:5])}{' ...' * (len(unused) > 5)}")
    check_metadata(contents)
    known.complete(contents)
    return contents


def read_states(path: Path) -> dict[str, StateDict]:
    """The state dicts of a PyTorch file by key, or that of a folder under ""."""
    if not path.is_dir():
        return read_torch_file(path)
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{path}: holds no model.safetensors and no pytorch_model.bin")
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    return {"": tensors}

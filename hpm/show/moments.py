"""Snapshots of the panels of held-out images during training, for the report."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpm.core.errors import UserError
from hpm.core.files import read_tensors, write_tensors
from hpm.show.figures import Picture, as_rgb, pixels
from hpm.show.scale import Scale
from hpm.show.strips import all_frames, count_frames, cut

MAX_SIDE = 128  # pixels of the longer side
MAX_MOMENTS = 10  # shown in a report
ANIMATIONS = "clips.safetensors"
MAX_ANIMATED = 4  # clips
ANIMATED_SIDE = 96  # pixels of the longer side of a frame


@dataclass
class Moment:
    """The panels at one step; None if the model lacks them."""

    step: int
    images: np.ndarray  # uint8 [B H W 3]
    mask: np.ndarray  # bool [B rows columns], True where hidden
    actual: np.ndarray  # float32 [B rows columns], NaN for patches that no mask hid
    predicted: np.ndarray | None
    reconstruction: np.ndarray | None  # shaped like images

    def picture(self, count: int) -> Picture:
        """The panels of the first images, to draw them."""

        def pixels_of(images: np.ndarray | None) -> Tensor | None:
            return None if images is None else torch.from_numpy(images[:count]).movedim(-1, 1)

        def patches_of(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values[:count]).flatten(1)

        images = pixels_of(self.images)
        assert images is not None
        return Picture(
            images,
            self.mask.shape[1:],
            actual=patches_of(self.actual),
            predicted=patches_of(self.predicted),
            mask=patches_of(self.mask),
            reconstruction=pixels_of(self.reconstruction),
        )


def keep_moment(shown: Picture, folder: Path, step: int) -> None:
    """Write the panels of a picture into `folder`."""
    write_tensors(_file(folder, step), _tensors(shown), {"step": step})


def moment_of(shown: Picture, step: int) -> Moment:
    """The panels of a picture, as they would be read from a file."""
    return _moment(step, _tensors(shown))


def _tensors(shown: Picture) -> dict[str, Tensor]:
    """The panels by name, images shrunk to at most 128 pixels a side, and film strips a little
    less."""
    assert shown.mask is not None and shown.actual is not None
    grid = (len(shown.images), *shown.grid)
    tensors = {
        "images": _small(shown.images, shown.images),
        "mask": shown.mask.view(grid),
        "actual": shown.actual.float().reshape(grid),
    }
    if shown.predicted is not None:
        tensors["predicted"] = shown.predicted.float().reshape(grid)
    if shown.reconstruction is not None:
        tensors["reconstruction"] = _small(shown.reconstruction, shown.images)
    return tensors


def _moment(step: int, tensors: dict[str, Tensor]) -> Moment:
    parts = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Moment(
        step,
        parts["images"],
        parts["mask"],
        parts["actual"],
        parts.get("predicted"),
        parts.get("reconstruction"),
    )


def keep_animations(shown: Picture, folder: Path, step: int) -> None:
    """Write the frames of the panels of some clips, at most 96 pixels a side, over those of an
    earlier step."""
    frames, laid = count_frames(shown), all_frames(shown)
    tensors: dict[str, Tensor] = {}
    for row in range(min(MAX_ANIMATED, len(shown.images))):
        for name, panel in pixels(laid, row).items():
            small = [_thumbnail(frame, ANIMATED_SIDE) for frame in cut(panel, frames)]
            tensors[f"{row}.{name}"] = torch.from_numpy(np.stack(small))
    write_tensors(folder / ANIMATIONS, tensors, {"step": step, "scale": laid.scale})


@dataclass
class Animations:
    """Clips at one step: the panels [T H W 3] of each by name, and the scale of their losses."""

    step: int
    clips: list[dict[str, np.ndarray]]
    scale: Scale | None


def read_animations(folder: Path, last_step: int) -> Animations | None:
    """None for images, a damaged file, or a step after the last one."""
    if not (folder / ANIMATIONS).exists():
        return None
    try:
        tensors, about = read_tensors(folder / ANIMATIONS)
    except UserError:
        return None
    rows: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        row, _, panel = name.partition(".")
        rows.setdefault(row, {})[panel] = tensor.numpy()
    step, scale = about.get("step", 0), about.get("scale")
    if step > last_step:
        return None
    return Animations(step, [rows[row] for row in sorted(rows)], Scale(*scale) if scale else None)


def measured_steps(folder: Path, last_step: int) -> list[int]:
    """The steps that a moment was kept of. Those after the last step are left out: they are of a
    training that was taken back."""
    # One listing: a long run logs too many steps to look for a file of each.
    named = [file.stem.removeprefix("step_") for file in folder.glob("step_*.safetensors")]
    return sorted(int(step) for step in named if step.isdigit() and int(step) <= last_step)


def latest_moment(folder: Path, last_step: int) -> Moment | None:
    """The latest moment until this step; None without any that can be read."""
    for step in reversed(measured_steps(folder, last_step)):
        with contextlib.suppress(UserError, KeyError):
            return _moment(step, read_tensors(_file(folder, step))[0])
    return None


def read_moments(folder: Path, last_step: int) -> list[Moment]:
    """Read at most ten moments until this step, including the first and the last."""
    found = measured_steps(folder, last_step)
    if len(found) > MAX_MOMENTS:
        places = np.linspace(0, len(found) - 1, MAX_MOMENTS).round().astype(int)
        found = [found[place] for place in places]
    moments = []
    for step in found:
        with contextlib.suppress(UserError, KeyError):  # skip damaged files
            moments.append(_moment(step, read_tensors(_file(folder, step))[0]))
    return moments


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def _small(images: Tensor, like: Tensor) -> Tensor:
    """[B C H W] -> uint8 [B H W 3]."""
    small = []
    for image, original in zip(images, like, strict=True):
        rgb = as_rgb(image, original)
        wide = max(1, rgb.shape[1] // rgb.shape[0] // 2)
        small.append(torch.from_numpy(_thumbnail(rgb, MAX_SIDE, wide)))
    return torch.stack(small)


def _thumbnail(rgb: np.ndarray, side: int, wide: int = 1) -> np.ndarray:
    """[H W 3], at most `side` high and `wide` times that across."""
    picture = Image.fromarray(rgb)
    picture.thumbnail((side * wide, side))
    return np.array(picture)

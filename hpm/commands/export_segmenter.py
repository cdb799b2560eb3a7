"""Export a segmenter to ONNX, and check that its outputs are the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpm.core.errors import UserError
from hpm.core.files import disk_error
from hpm.data.loader import normalize
from hpm.weights.onnx import run_onnx, write_onnx
from hpm.weights.segmentation import SegmentationModel

# Largest difference of a logit in float32; relative where logits are larger than 1.
TOLERANCE = 1e-4


class WindowFromPixels(nn.Module):
    """A segmenter that takes windows of pixels on a scale of 0 to 1: [B C S S] -> logits [B K S
    S]."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    def forward(
        self, images: Float[Tensor, "batch channels side side"]
    ) -> Float[Tensor, "batch classes side side"]:
        pixels = normalize(images, self.model.mean, self.model.std, full_scale=1)
        return self.model.segmenter(pixels)


def export_segmenter(
    model: SegmentationModel, out: Path, report: Callable[[str], Any] = print
) -> Path:
    """Write the model for one window as ONNX; the user cuts images into windows. Raises UserError,
    and leaves no file, if ONNX Runtime's outputs differ."""
    windows = WindowFromPixels(model.cpu()).eval()
    shape = (model.channels, model.image_size, model.image_size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            staged = Path(folder) / out.name
            write_onnx(windows, torch.zeros(2, *shape), staged, ["logits"])
            difference = _difference(windows, staged, shape)
            os.replace(staged, out)
    except OSError as error:
        raise disk_error(out, error) from None
    report(f"the same outputs as ours, to {difference:.1e} (largest difference, random images)")
    report(f"written to {out}; to load it:\n\n{_lines(model, out)}\n")
    return out


@torch.no_grad()
def _difference(model: WindowFromPixels, path: Path, shape: tuple[int, ...]) -> float:
    """The largest difference between our logits and the file's. Raises UserError if it is too
    large."""
    largest = 0.0
    for batch in (2, 1):
        images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
        ours, theirs = model(images), run_onnx(path, images)["logits"]
        difference = (theirs - ours).abs().max().item()
        # Written so that NaN is refused.
        if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
            raise UserError(
                f"the exported model gives other logits than ours, by {difference:.1e} "
                f"({TOLERANCE:g} is allowed): nothing was written"
            )
        largest = max(largest, difference)
    return largest


def _lines(model: SegmentationModel, path: Path) -> str:
    side = model.image_size
    return (
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{path}")\n'
        f"# pixels: float32 [B, {model.channels}, {side}, {side}], full scale 1 (8 bits divided by "
        "255), not normalised;\n"
        f"# windows of an image whose shorter side was resized to {side}\n"
        '(logits,) = session.run(None, {"images": pixels})\n'
        f"labels = logits.argmax(1)  # numbers into {len(model.classes)} classes"
    )

"""Optional libraries, imported where they are used; a missing one is one clear line."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hpm.core.errors import UserError

# These import torchvision where it is installed.
NEED_TORCHVISION = ("timm", "torchvision", "transformers")


def need(module: str, extra: str, job: str) -> ModuleType:
    """Import an optional module. Raises UserError naming the extra of `pip install` it is in."""
    try:
        if module.split(".")[0] in NEED_TORCHVISION and find_spec("torchvision"):
            _mend_torchvision()
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{job} needs {error.name or module}: pip install 'hpm[{extra}]'") from None


_library: Any = None  # a declaration lasts as long as this object


def _mend_torchvision() -> None:
    """Make torchvision import where its compiled operators do not fit the PyTorch beside it.

    A torchvision built for CUDA refuses to import beside a CPU build of PyTorch, because it wants
    to describe operators that were never declared. We need its transforms alone, which are pure
    Python, so the operators are declared. Only after the plain import has failed: where it works,
    declaring them a second time aborts the process.
    """
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _library is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.impl("nms", _nms, "CPU")
        import torchvision  # noqa: F401


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [N 4] (x0 y0 x1 y1) that no better one overlaps, best first."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    waiting, kept = scores.argsort(descending=True, stable=True), []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[waiting, :2])
        high = torch.minimum(boxes[best, 2:], boxes[waiting, 2:])
        overlap = (high - low).clamp(min=0).prod(1)
        iou = overlap / (areas[best] + areas[waiting] - overlap)
        waiting = waiting[iou <= iou_threshold]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.int64)

"""Import torchvision beside a build of PyTorch that its compiled operators do not fit."""

from __future__ import annotations

import sys
from typing import Any

import torch

from hpm.core import boxes

_declared: Any = None  # a declaration lasts as long as this object


def replaces_operators() -> bool:
    """Whether torchvision was imported with operators in plain PyTorch."""
    return _declared is not None


def import_torchvision() -> None:
    """Import torchvision, with operators in plain PyTorch where the compiled ones are missing.

    A torchvision built for CUDA refuses to import beside a CPU build of PyTorch, because it
    describes operators that were never declared. So they are declared here, and those that
    detection needs are replaced. The plain import is tried first: declaring operators that exist
    aborts the process.
    """
    global _declared
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _declared is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        # torchvision's own roi_align in Python compiles on the first call, which takes a minute.
        operators: Any = sys.modules["torchvision.ops.roi_align"]
        operators._roi_align = boxes.roi_align
        torchvision.ops.nms = torchvision.ops.boxes.nms = boxes.nms

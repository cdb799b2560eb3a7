"""Optional libraries, imported where they are used. A missing one is a one-line error."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

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
    to describe operators that were never declared. So they are declared, and those that detection
    needs are replaced by plain PyTorch. Only after the plain import has failed: where it works,
    declaring them a second time aborts the process.
    """
    global _library
    from hpm.core import boxes

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
        import torchvision

        # Its own roi_align in Python is compiled on the first call, which takes a minute.
        operators: Any = sys.modules["torchvision.ops.roi_align"]
        operators._roi_align = boxes.roi_align
        torchvision.ops.nms = torchvision.ops.boxes.nms = boxes.nms

"""The precision that `auto` stands for, and float64 where a device has none."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AMPERE = 8  # the first of NVIDIA's generations (compute capability) that computes in bfloat16


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that is faster in bfloat16. Older ones (T4, V100) emulate it, and
    are slower than in float32."""
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= AMPERE


def auto_precision(device: torch.device) -> Literal["bfloat16", "float32"]:
    """The precision of `auto` on a device."""
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


def to_float64(tensor: Tensor) -> Tensor:
    """In float64; on the CPU if the tensor's device, Apple's GPU, has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

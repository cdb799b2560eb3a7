"""Whether student and teacher are compiled."""

from __future__ import annotations

from typing import Any

import torch

from hpm.core.compilers import REMEDY, has_compiler
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError


def compiles(config: PretrainConfig, device: torch.device) -> bool:
    """Whether to compile models that are not sharded.

    Raises UserError if `compile` is true and there is no compiler.
    """
    if config.compile == "auto":
        return device.type == "cuda" and has_compiler(device.type)
    if config.compile == "true" and not has_compiler(device.type):
        raise UserError(f"compile is true, but there is no compiler: {REMEDY}, or leave it out")
    return config.compile == "true"


def describe_uncompiled(config: PretrainConfig, device: torch.device) -> list[str]:
    """A warning if a run is not compiled only because there is no compiler."""
    if config.compile != "auto" or device.type != "cuda" or compiles(config, device):
        return []
    return [f"warning: not compiled, and slower, since there is no C compiler: {REMEDY}"]


def compile_part(part: Any, compiled: bool) -> Any:
    """Compile a module or function if `compiled`."""
    return torch.compile(part, dynamic=False) if compiled else part

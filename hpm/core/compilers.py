"""The compiler that torch.compile calls when a training starts."""

from __future__ import annotations

import os
import shutil

REMEDY = "install g++ (apt-get install g++)"


def has_compiler(device_type: str) -> bool:
    """Whether the compiler that torch.compile needs for a device is here: Triton, for a GPU, takes
    a C compiler, and the CPU's kernels are C++."""
    on_gpu = device_type == "cuda"
    chosen = os.environ.get("CC" if on_gpu else "CXX", "").split()[:1]
    names = chosen or (["gcc", "clang"] if on_gpu else ["g++", "clang++"])
    return any(shutil.which(name) for name in names)

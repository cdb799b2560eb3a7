"""The compiler that torch.compile calls when a training starts."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

REMEDY = "install g++ and Python's headers (apt-get install g++ python3-dev)"


def has_compiler(device_type: str) -> bool:
    """Whether the compiler that torch.compile needs for a device is here: Triton, for a GPU, takes
    a C compiler, and the CPU's kernels are C++. Both include Python's headers, which systems have
    as a package of their own."""
    on_gpu = device_type == "cuda"
    chosen = os.environ.get("CC" if on_gpu else "CXX", "").split()[:1]
    names = chosen or (["gcc", "clang"] if on_gpu else ["g++", "clang++"])
    # Not the default scheme, which on Debian is that of /usr/local.
    headers = Path(sysconfig.get_paths("posix_prefix")["include"]) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in names)

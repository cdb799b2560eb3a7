"""Preserve the global random states of a program that calls hpm."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and PyTorch (including the GPU's, if it is
    the device) after the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    kind = "cpu" if device is None else device.type
    devices = [device] if kind == "cuda" else []
    mps_state = torch.mps.get_rng_state() if kind == "mps" else None  # fork_rng does not take it
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002

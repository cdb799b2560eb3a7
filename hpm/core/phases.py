"""Named phases of a training step: a profiler's trace shows them, and a benchmark times them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

_clocks: list[PhaseClock] = []  # those that are running


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the training step, shown under its name in a trace of `torch.profiler`."""
    started = [clock.now() for clock in _clocks]
    with record_function(name):
        yield
        ended = [clock.now() for clock in _clocks]
    for clock, start, end in zip(_clocks, started, ended, strict=True):
        clock.seconds[name] = clock.seconds.get(name, 0.0) + end - start


class PhaseClock:
    """Times the phases that run inside `with PhaseClock(device) as clock`.

    It waits for the device where a phase begins and ends, so a step under it takes longer.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}  # by phase, over all steps

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def __enter__(self) -> PhaseClock:
        _clocks.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _clocks.remove(self)

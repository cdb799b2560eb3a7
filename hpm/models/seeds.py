"""Seeds for initial weights, derived from a seed and the name of a part of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def part_seed(seed: int, part: str) -> int:
    """A different seed for each part of a model."""
    digest = hashlib.blake2b(f"{seed} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # PyTorch's seeds are signed


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed PyTorch's generator of the CPU inside the context, and restore its state afterwards.
    With None, do nothing."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would also seed those of GPUs, whose states are not restored.
            torch.random.default_generator.manual_seed(seed)
        yield

"""The contents of a weights file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpm.core.config import PretrainConfig
from hpm.core.files import StateDict
from hpm.models.architecture import Architecture
from hpm.weights.format import ReadableFormat


@dataclass
class Contents:
    """The tensors of a weights file, and what is known about them.

    Tensors are named as in `MaskedImageModel`, unless `recognised` is False.
    """

    name: str  # as the user gave it
    path: Path  # the file or folder that was read
    student: StateDict
    teacher: StateDict | None = None
    architecture: Architecture | None = None  # None until it is derived from the shapes
    mean: list[float] | None = None
    std: list[float] | None = None
    config: PretrainConfig | None = None  # None for another library's weights, or a backbone
    step: int | None = None
    folder: Path | None = None  # run folder
    format: ReadableFormat | None = None  # None if ours, or not recognised
    unused: list[str] = field(default_factory=list)  # names of tensors in the file
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON beside another library's file
    notes: list[str] = field(default_factory=list)  # findings and assumptions, for the user

    @property
    def recognised(self) -> bool:
        return self.architecture is not None or self.format is not None


def size_text(size: Sequence[int]) -> str:
    """`16 x 16`"""
    return " x ".join(map(str, size))

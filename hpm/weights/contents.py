"""The contents of a weights file, and the base class of the formats that it may have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hpm.core.choices import Positions, TargetName
from hpm.core.config import PretrainConfig
from hpm.core.files import StateDict
from hpm.models.architecture import Architecture
from hpm.weights.renaming import Rules, join_qkv, rename, unwrap

# Tensors that our models lack: heads, poolers, and the mask token of a plain ViT.
UNUSED = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "pooler.", "classifier.", "embeddings.")


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
    frame_stride: int | None = None  # of the clips that it was trained on, if known
    folder: Path | None = None  # run folder
    format: ReadableFormat | None = None  # None if ours, or not recognised
    unused: list[str] = field(default_factory=list)  # names of tensors in the file
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON beside another library's file
    notes: list[str] = field(default_factory=list)  # findings and assumptions, for the user

    @property
    def recognised(self) -> bool:
        return self.architecture is not None or self.format is not None


class ReadableFormat:
    """Another library's weights, recognised by their tensor names."""

    description: ClassVar[str]
    rules: ClassVar[Rules]  # from their names to ours
    has_decoder: ClassVar[bool] = False
    has_predictor: ClassVar[bool] = False
    axes: ClassVar[int] = 2  # of images; 3 of clips
    class_token: ClassVar[bool] = True
    positions: ClassVar[Positions] = "sincos"
    normalized_target: ClassVar[TargetName] = "normalized_pixels"
    may_lack_norm: ClassVar[bool] = False  # the final norm of the encoder

    def matches(self, names: set[str]) -> bool:
        """Whether these tensor names (without wrapper prefixes) are of this format."""
        raise NotImplementedError

    def to_ours(self, state: StateDict) -> tuple[StateDict, list[str]]:
        """(tensors under our names, names in the file of unused tensors)."""
        bare = {unwrap(name): tensor for name, tensor in state.items()}
        if "norm.weight" not in bare and "fc_norm.weight" in bare:
            # The model normalises after pooling; ours normalises each token with these weights.
            bare = {re.sub(r"^fc_norm\.", "norm.", name): t for name, t in bare.items()}
        renamed = {rename(name, self.rules): (name, tensor) for name, tensor in bare.items()}
        unused = [old for new, (old, _) in renamed.items() if new.startswith(UNUSED)]
        ours = {new: t for new, (_, t) in renamed.items() if not new.startswith(UNUSED)}
        return join_qkv(ours), unused

    def complete(self, contents: Contents) -> None:
        """Add what a file of this format leaves out, from the JSON beside it. Raises UserError
        where that is not known."""

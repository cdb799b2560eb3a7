"""Base classes of weight formats, for reading and for writing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from hpm.core.choices import Positions, TargetName
from hpm.core.files import StateDict
from hpm.weights.renaming import Rules, join_qkv, rename, unwrap

if TYPE_CHECKING:
    from hpm.weights.contents import Contents

# Tensors that our models lack: heads, poolers, and the mask token of a plain ViT.
UNUSED = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "pooler.", "classifier.", "embeddings.")


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


def starts(names: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with the prefix."""
    return any(name.startswith(prefix) for name in names)

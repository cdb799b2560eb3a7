"""Base classes of weight formats, for reading and for writing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from hpm.core.files import StateDict
from hpm.weights.renaming import Rules, join_qkv, rename, unwrap

# Tensors that our models lack: heads, poolers, and the mask token of a plain ViT.
UNUSED = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "pooler.", "classifier.", "embeddings.")


class ReadableFormat:
    """Another library's weights, recognised by their tensor names."""

    description: ClassVar[str]
    rules: ClassVar[Rules]  # from their names to ours
    has_decoder: ClassVar[bool] = False
    has_predictor: ClassVar[bool] = False

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


def starts(names: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with the prefix."""
    return any(name.startswith(prefix) for name in names)

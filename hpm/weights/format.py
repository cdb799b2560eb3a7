"""What a file format has to offer to be read, and to be written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from hpm.core.files import StateDict
from hpm.weights.renaming import Rules, join_qkv, rename, unwrap

# Tensors that our models do not have: heads and poolers, and the mask token of a plain ViT.
UNUSED = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "pooler.", "classifier.", "embeddings.")


class ReadableFormat:
    """Weights of another library, recognised by the names of their tensors."""

    description: ClassVar[str]
    rules: ClassVar[Rules]  # from their names to ours
    has_decoder: ClassVar[bool] = False
    has_predictor: ClassVar[bool] = False

    def matches(self, names: set[str]) -> bool:
        """Whether tensors of these names (without wrappers) are of this format."""
        raise NotImplementedError

    def to_ours(self, state: StateDict) -> tuple[StateDict, list[str]]:
        """The tensors under our names, and the names in the file of those that are not used."""
        bare = {unwrap(name): tensor for name, tensor in state.items()}
        if "norm.weight" not in bare and "fc_norm.weight" in bare:
            # The model norms after pooling; ours norms each token with the same weights.
            bare = {re.sub(r"^fc_norm\.", "norm.", name): t for name, t in bare.items()}
        renamed = {rename(name, self.rules): (name, tensor) for name, tensor in bare.items()}
        unused = [old for new, (old, _) in renamed.items() if new.startswith(UNUSED)]
        ours = {new: t for new, (_, t) in renamed.items() if not new.startswith(UNUSED)}
        return join_qkv(ours), unused


def starts(names: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with the prefix."""
    return any(name.startswith(prefix) for name in names)

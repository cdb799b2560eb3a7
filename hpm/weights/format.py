"""Base classes of weight formats, for reading and for writing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hpm.core.files import StateDict
from hpm.models.architecture import Architecture
from hpm.models.mim import MaskedImageModel
from hpm.models.timm_models import PREFIX
from hpm.models.vit import VisionTransformer
from hpm.weights.backbone import Backbone
from hpm.weights.renaming import Rules, join_qkv, rename, unwrap
from hpm.weights.trained import Trained

Outputs = dict[str, Tensor]

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


@dataclass
class ExportSource:
    """A backbone to export, and the whole model if the format includes the decoder."""

    trained: Trained
    backbone: Backbone
    model: MaskedImageModel | None = None
    crop_share: float = 1.0  # see transforms.evaluation_view

    @property
    def encoder(self) -> Any:
        return self.backbone.encoder

    @property
    def architecture(self) -> Architecture:
        return self.trained.architecture

    @property
    def square(self) -> bool:
        (height, width), (rows, columns) = self.encoder.image_size, self.encoder.patch_size
        return height == width and rows == columns


class WritableFormat:
    """A format that `hpm export` writes. The file is read back with the other library, and its
    pooled features [B D] and patches [B N D] are compared with ours.

    suffixes: accepted suffixes of the file; empty for a folder.
    """

    suffixes: tuple[str, ...] = ()

    def unsupported(self, source: ExportSource) -> str | None:
        """Why the format does not support this model, or None if it does."""
        return None

    def write(self, source: ExportSource, path: Path) -> None:
        raise NotImplementedError

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        """The outputs of the file, in the other library, for normalised images [B C H W]."""
        raise NotImplementedError

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        """The same outputs from our model."""
        pooled, patches = source.backbone(images)
        return {"pooled": pooled, "patches": patches}

    def code(self, source: ExportSource, path: Path) -> str:
        """Python code that loads the file and runs it on `images`."""
        raise NotImplementedError


def unless_plain_vit(source: ExportSource, library: str) -> str | None:
    """Why a library that has only the plain ViT does not support this encoder, or None."""
    if isinstance(source.encoder, VisionTransformer):
        return None
    name = f"{PREFIX}{source.encoder.name}"
    return f"{library} cannot express {name}: pass --to timm or onnx"


def starts(names: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with the prefix."""
    return any(name.startswith(prefix) for name in names)

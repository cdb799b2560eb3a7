"""The base class of formats that `hpm export` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpm.models.architecture import Architecture
from hpm.models.mim import MaskedImageModel
from hpm.models.timm_models import PREFIX
from hpm.models.vit import VisionTransformer
from hpm.weights.backbone import Backbone
from hpm.weights.classification import ClassificationModel
from hpm.weights.trained import Trained

Outputs = dict[str, Tensor]


@dataclass
class ExportSource:
    """A backbone to export, and the whole model if the format includes the decoder."""

    trained: Trained
    backbone: Backbone
    model: MaskedImageModel | None = None
    crop_share: float = 1.0  # see transforms.evaluation_view
    classifier: ClassificationModel | None = None  # whose encoder is that of the backbone

    @property
    def encoder(self) -> Any:
        return self.backbone.encoder

    @property
    def architecture(self) -> Architecture:
        return self.trained.architecture

    @property
    def square(self) -> bool:
        (height, width), (rows, columns) = (
            self.encoder.image_size[-2:],
            self.encoder.patch_size[-2:],
        )
        return height == width and rows == columns

    def need_classifier(self) -> ClassificationModel:
        """The fine-tuned classifier. Raises ValueError if a backbone is exported."""
        if self.classifier is None:
            raise ValueError("there is no classifier to export")
        return self.classifier

    @property
    def of_clips(self) -> bool:
        return len(self.encoder.image_size) == 3


class WritableFormat:
    """A format that `hpm export` writes, reads back with the other library, and compares by pooled
    features [B D] and patches [B N D].

    suffixes: those that the file may have; empty for a folder.
    """

    suffixes: tuple[str, ...] = ()

    def unsupported(self, source: ExportSource) -> str | None:
        """Why the format does not support this model, or None if it does."""
        return None

    def write(self, source: ExportSource, path: Path) -> None:
        raise NotImplementedError

    def outputs(self, source: ExportSource, path: Path, images: Tensor) -> Outputs:
        """The outputs of the file, in the other library, for normalised images [B C H W], or clips
        [B C T H W]."""
        raise NotImplementedError

    def our_outputs(self, source: ExportSource, images: Tensor) -> Outputs:
        """The same outputs from our model."""
        pooled, patches = source.backbone(images)
        return {"pooled": pooled, "patches": patches}

    def code(self, source: ExportSource, path: Path) -> str:
        """Python code that loads the file and runs it on `images`."""
        raise NotImplementedError


def about_input(source: ExportSource) -> str:
    """A comment for code that takes normalised images: their type, shape and normalisation."""
    encoder, backbone = source.encoder, source.backbone
    shape = ", ".join(map(str, ("B", encoder.channels, *encoder.image_size)))
    mean, std = (
        ", ".join(f"{value:.6g}" for value in each.tolist())
        for each in (backbone.mean, backbone.std)
    )
    return (
        f"# images: float32 [{shape}], pixels on a scale of 0 to 1 (8 bits divided by 255),\n"
        f"# minus the mean [{mean}], divided by the standard deviation [{std}]\n"
    )


def unless_images(source: ExportSource, library: str) -> str | None:
    """Why a library without models of clips does not support this encoder, or None."""
    if not source.of_clips:
        return None
    return (
        f"{library} takes images, but this encoder takes clips: pass --to hf, onnx or safetensors"
    )


def unless_plain_vit(source: ExportSource, library: str, class_token: bool = True) -> str | None:
    """Why a library that has only the plain ViT does not support this encoder, or None.

    class_token: whether all of its models have one.
    """
    if isinstance(source.encoder, VisionTransformer):
        count = source.encoder.num_class_tokens
        if count == 1 or (count == 0 and not class_token):
            return None
        return (
            f"{library} has {'one' if class_token else 'no'} class token, and this encoder has "
            f"{count or 'none'}: pass --to timm, onnx or safetensors"
        )
    name = source.architecture.model or ""
    others = "timm or onnx" if name.startswith(PREFIX) else "onnx or safetensors"
    return f"{library} cannot express {name}: pass --to {others}"

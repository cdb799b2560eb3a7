"""A fine-tuned classifier with its class names and normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hpm.core.files import StateDict, write_tensors
from hpm.data.loader import normalize
from hpm.data.video.sampling import ClipSampling
from hpm.models.architecture import Architecture
from hpm.models.build import build_classifier
from hpm.models.classifier import Classifier
from hpm.weights.checkpoint import load_exactly

KIND = "hpm classifier"


class ClassificationModel(nn.Module):
    """A classifier of images or clips, as `hpm eval finetune` writes it.

    Maps normalised images [B C H W], or clips [B C T H W], to logits [B K].

    Args:
        classifier: encoder, pooling, norm and head.
        architecture: of the encoder.
        classes: names of the K classes.
        mean, std: of each channel, on a scale of 0 to 1.
        frame_stride: of the clips that it was trained on, if known.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classifier: Classifier,
        architecture: Architecture,
        classes: list[str],
        mean: list[float],
        std: list[float],
        frame_stride: int | None = None,
    ):
        super().__init__()
        self.classifier = classifier
        self.frame_stride = frame_stride
        self.architecture, self.classes = architecture, list(classes)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch classes"]:
        return self.classifier(images)

    def normalize(
        self, pixels: Shaped[Tensor, "batch channels *size"], full_scale: float | None = None
    ) -> Float[Tensor, "batch channels *size"]:
        """Normalise pixels, see `Backbone.normalize`."""
        return normalize(pixels.to(self.mean.device), self.mean, self.std, full_scale)

    def sampling(self, frame_stride: int | None = None) -> ClipSampling | None:
        """Which frames of a video it takes, by default those of its training; None for images."""
        size = self.architecture.image_size
        if len(size) == 2:
            return None
        stride = self.frame_stride if frame_stride is None else frame_stride
        return ClipSampling(size[0]) if stride is None else ClipSampling(size[0], stride)

    @classmethod
    def from_file(
        cls, path: Path, tensors: StateDict, about: dict[str, Any]
    ) -> ClassificationModel:
        """Build a trained model, in evaluation mode. Raises UserError if its weights do not fit."""
        architecture = Architecture.from_json(about["architecture"], path)
        classes: list[str] = about["classes"]
        classifier = build_classifier(architecture, None, len(classes), about["pool"])
        load_exactly(classifier, tensors, path)
        return cls(
            classifier,
            architecture,
            classes,
            about["mean"],
            about["std"],
            about.get("frame_stride"),
        ).eval()


def write_classifier(model: ClassificationModel, path: Path) -> None:
    """Write the file that `ClassificationModel.from_file` reads."""
    about: dict[str, Any] = {
        "kind": KIND,
        "architecture": model.architecture.to_json(),
        "pool": model.classifier.pool,
        "classes": model.classes,
        "mean": model.mean.tolist(),
        "std": model.std.tolist(),
    }
    if model.frame_stride is not None:
        about["frame_stride"] = model.frame_stride
    write_tensors(path, model.classifier.state_dict(), about)

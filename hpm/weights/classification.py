"""A fine-tuned classifier with its class names and normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hpm.core.files import StateDict
from hpm.data.loader import normalize
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
    ):
        super().__init__()
        self.classifier = classifier
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

    @classmethod
    def from_file(
        cls, path: Path, tensors: StateDict, about: dict[str, Any]
    ) -> ClassificationModel:
        """Build a trained model, in evaluation mode. Raises UserError if its weights do not fit."""
        architecture = Architecture.from_json(about["architecture"], path)
        classes: list[str] = about["classes"]
        classifier = build_classifier(architecture, None, len(classes), about["pool"])
        load_exactly(classifier, tensors, path)
        return cls(classifier, architecture, classes, about["mean"], about["std"]).eval()

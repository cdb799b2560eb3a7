"""A trained segmenter with its preprocessing: images in, labels of their pixels out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from hpm.core.errors import UserError, one_line
from hpm.core.files import StateDict, write_tensors, write_text
from hpm.core.version import __version__
from hpm.data.arrays import UnreadableImage, is_deep
from hpm.data.joint import whole_image
from hpm.data.loader import normalize
from hpm.models.architecture import Architecture
from hpm.models.build import resized_encoder
from hpm.models.segmenter import LinearSegmenter, UPerNetSegmenter, sliding_window
from hpm.models.upernet import resize
from hpm.weights.backbone import opened
from hpm.weights.checkpoint import load_exactly

KIND = "hpm segmenter"
AT_ONCE = 2**25  # scores that are enlarged at once
Segmenter = LinearSegmenter | UPerNetSegmenter


class SegmentationModel(nn.Module):
    """A segmenter with its class names and preprocessing.

    Maps normalised images [B C H W], whose shorter side should be `image_size`, to logits [B K H
    W], averaged over sliding windows.

    Args:
        segmenter: its encoder's image_size is that of the windows.
        architecture: of the encoder.
        classes: names of the K classes.
        mean, std: of each channel, on a scale of 0 to 1.
        stride: pixels between two windows.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        segmenter: Segmenter,
        architecture: Architecture,
        classes: list[str],
        mean: list[float],
        std: list[float],
        stride: int,
    ):
        super().__init__()
        self.segmenter = segmenter
        self.architecture, self.classes, self.stride = architecture, list(classes), stride
        self.image_size: int = segmenter.encoder.image_size[0]
        self.channels = segmenter.encoder.channels
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        return sliding_window(
            self.segmenter, images, self.image_size, self.stride, len(self.classes)
        )

    @torch.no_grad()
    def labels(
        self, image: Shaped[Tensor, "channels rows columns"], size: tuple[int, int]
    ) -> UInt8[Tensor, "height width"]:
        """The class of each pixel of a loaded image.

        image: uint8, or float32 on a scale of 0 to 255, with a shorter side of image_size. size:
        (height, width) of the result.
        """
        logits = self(normalize(image[None].to(self.mean.device), self.mean, self.std))
        return best_classes(logits, size)

    def preprocess(self, picture: Any) -> Float[Tensor, "1 channels height width"]:
        """Resize the shorter side to image_size, and normalise: [1 C H W].

        picture: a Pillow image, the path of an image file, or an array, uint8 or uint16 [H W C] or
        [H W]. Raises UserError if it cannot be read.
        """
        image, _ = self._loaded(picture)
        return normalize(image[None].to(self.mean.device), self.mean, self.std)

    def predict(self, picture: Any) -> UInt8[np.ndarray, "height width"]:
        """The class of each pixel of a picture (see `preprocess`), as an index into `classes`."""
        image, size = self._loaded(picture)
        return self.labels(image, size).cpu().numpy()

    def save(self, path: Path) -> None:
        """Write a safetensors file, and its JSON beside it."""
        about = self.about()
        write_tensors(path, self.segmenter.state_dict(), about)
        write_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")

    def about(self) -> dict[str, Any]:
        """What `from_file` needs besides the weights."""
        head: dict[str, Any] = {"head": "linear"}
        if isinstance(self.segmenter, UPerNetSegmenter):
            head = {
                "head": "upernet",
                "head_channels": self.segmenter.channels,
                "blocks": self.segmenter.blocks,
            }
        return {
            "kind": KIND,
            **head,
            "architecture": self.architecture.encoder().to_json(),
            "image_size": self.image_size,
            "stride": self.stride,
            "classes": self.classes,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "hpm": __version__,
        }

    @classmethod
    def from_file(cls, path: Path, tensors: StateDict, about: dict[str, Any]) -> SegmentationModel:
        """The model in a file written by `save`, in evaluation mode."""
        side, classes = about["image_size"], about["classes"]
        architecture = Architecture.from_json(about["architecture"], path)
        encoder = resized_encoder(architecture, None, (side, side))
        segmenter: Segmenter
        if about["head"] == "upernet":
            segmenter = UPerNetSegmenter(
                encoder, len(classes), about["head_channels"], about["blocks"]
            )
        else:
            segmenter = LinearSegmenter(encoder, len(classes))
        load_exactly(segmenter, tensors, path)
        settings = (about[name] for name in ("mean", "std", "stride"))
        return cls(segmenter, architecture, classes, *settings).eval()

    def _loaded(self, picture: Any) -> tuple[Tensor, tuple[int, int]]:
        """(the loaded picture, its (height, width))."""
        name = str(picture) if isinstance(picture, (str, Path)) else "the picture"
        try:
            image = opened(picture)
            return whole_image(image, self.channels, self.image_size, deep=is_deep(image))
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{name} cannot be used: {one_line(error)}") from None


def best_classes(
    logits: Float[Tensor, "1 classes rows columns"], size: tuple[int, int]
) -> UInt8[Tensor, "height width"]:
    """The highest-scoring class of every pixel, with scores enlarged to `size`. A few classes are
    enlarged at a time, because all scores of a large photograph would not fit into memory."""
    height, width = size
    best = torch.full((height, width), -torch.inf, device=logits.device)
    labels = torch.zeros(height, width, dtype=torch.uint8, device=logits.device)
    first = 0
    for some in logits.split(max(1, AT_ONCE // (height * width)), dim=1):
        score, index = resize(some.float(), size)[0].max(0)
        better = score > best
        best = torch.where(better, score, best)
        labels = torch.where(better, (first + index).to(torch.uint8), labels)
        first += some.shape[1]
    return labels

"""A trained segmenter with its preprocessing: pictures in, labels of their pixels out."""

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
    """A segmenter, the names of its classes, and how its images are prepared.

    forward: normalised images [B C H W], whose shorter side should be `image_size`, -> logits
    [B K H W], averaged over the windows that they were read in.

    Args:
        segmenter: its encoder's image_size is that of the windows.
        architecture: the encoder's.
        classes: names, K of them.
        mean, std: of each channel, full scale being 1.
        stride: pixels from one window to the next.
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
        """The class of each pixel, of an image as it is loaded (uint8, or float32 with 255 for full
        scale; its shorter side resized to image_size). size: (height, width) of the result."""
        logits = self(normalize(image[None].to(self.mean.device), self.mean, self.std))
        return best_classes(logits, size)

    def preprocess(self, picture: Any) -> Float[Tensor, "1 channels height width"]:
        """A picture -> normalised, its shorter side resized to image_size.

        picture: a Pillow image, the path of an image file, or an array uint8 or uint16 [H W C] or
        [H W]. Raises UserError where it cannot be read.
        """
        image, _ = self._loaded(picture)
        return normalize(image[None].to(self.mean.device), self.mean, self.std)

    def predict(self, picture: Any) -> UInt8[np.ndarray, "height width"]:
        """The class of each pixel of a picture (see `preprocess`): numbers into `classes`."""
        image, size = self._loaded(picture)
        return self.labels(image, size).cpu().numpy()

    def save(self, path: Path) -> None:
        """Write it as safetensors, with its JSON beside it."""
        about = self.about()
        write_tensors(path, self.segmenter.state_dict(), about)
        write_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")

    def about(self) -> dict[str, Any]:
        """What `from_file` needs beside the weights."""
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
        """Built from what `save` wrote, in evaluation mode."""
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
        """A picture as it is loaded, and its (height, width)."""
        name = str(picture) if isinstance(picture, (str, Path)) else "the picture"
        try:
            image = opened(picture)
            return whole_image(image, self.channels, self.image_size, deep=is_deep(image))
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{name} cannot be used: {one_line(error)}") from None


def best_classes(
    logits: Float[Tensor, "1 classes rows columns"], size: tuple[int, int]
) -> UInt8[Tensor, "height width"]:
    """The class of the highest score in every pixel, of scores enlarged to `size`.

    Some classes at a time: those of a large photograph would not fit into memory together.
    """
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

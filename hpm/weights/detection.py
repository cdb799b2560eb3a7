"""A fine-tuned detector with its preprocessing: images in, objects in their pixels out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need
from hpm.core.files import StateDict, write_tensors, write_text
from hpm.core.version import __version__
from hpm.data.arrays import UnreadableImage, is_deep
from hpm.data.detection import Detections, Objects
from hpm.data.joint import whole_image
from hpm.data.loader import normalize
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder
from hpm.models.detector import build_detector
from hpm.models.encoder import Encoder
from hpm.models.pyramid import STRIDES
from hpm.weights.backbone import opened
from hpm.weights.checkpoint import load_exactly

KIND = "hpm detector"
MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to an object
PASTED_AT_A_TIME = 8  # masks in memory as floating-point numbers of the whole image
ANCHOR_STRIDES = (*STRIDES, 64)

Loaded = Shaped[Tensor, "channels _ _"]  # uint8, or float32 with 255 for full scale
Normalized = Float[Tensor, "channels _ _"]


@dataclass(frozen=True)
class DetectorShape:
    """Everything needed to build a detector.

    architecture: of the encoder; images are resized to fit into its image_size, a square. classes:
    names; class n of the detections is classes[n]. mean, std: of each channel, on a scale of 0 to
    1. masks: whether it predicts masks besides boxes. window_size, channels, anchor_scale,
    proposals, score_threshold: options of `hpm eval detect`.
    """

    architecture: Architecture
    classes: list[str]
    mean: list[float]
    std: list[float]
    masks: bool
    window_size: int | None
    channels: int
    anchor_scale: float
    proposals: int
    score_threshold: float

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: object) -> DetectorShape:
        """Read the shape from JSON. Raises UserError, naming `source`, if something is missing."""
        names = [name for name in cls.__dataclass_fields__ if name != "architecture"]
        missing = [name for name in ("architecture", *names) if name not in content]
        if missing:
            raise UserError(f"{source}: its description of the detector lacks {missing[0]}")
        architecture = Architecture.from_json(content["architecture"], source)
        return cls(architecture, **{name: content[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"architecture": self.architecture.encoder().to_json()}

    @property
    def image_size(self) -> int:
        return self.architecture.image_size[0]


class DetectionModel(nn.Module):
    """Mask R-CNN (Faster R-CNN without masks) with its class names and preprocessing.

    Maps a list of normalised images [C h w], no side longer than `image_size`, to a list of
    Detections in their pixels. Images are padded to a square of image_size pixels, so that
    detections do not depend on the other images of a batch. In training, maps images and their
    objects to losses by name.

    Args:
        shape: what to build.
        encoder: becomes part of the model. Default: a new one.
        box_batch_size: proposals per image that the heads are trained on.

    Raises:
        UserError: if the encoder is not a plain ViT, or its patches do not fit the pyramid.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, shape: DetectorShape, encoder: Encoder | None = None, box_batch_size: int = 512
    ):
        super().__init__()
        self.shape = shape
        self.image_size, self.classes = shape.image_size, list(shape.classes)
        self.channels = shape.architecture.channels
        encoder = encoder or build_encoder(shape.architecture)
        if type(encoder).feature_maps is Encoder.feature_maps:
            raise UserError(
                f"detection needs a plain ViT, and {shape.architecture.model} is none: its maps "
                "differ in size"
            )
        self.network = build_detector(
            encoder,
            len(shape.classes),
            shape.masks,
            shape.channels,
            shape.window_size,
            fixed_size=True,
            anchor_sizes=[shape.anchor_scale * stride for stride in ANCHOR_STRIDES],
            rpn_pre_nms_top_n_train=2 * shape.proposals,
            rpn_pre_nms_top_n_test=shape.proposals,
            rpn_post_nms_top_n_train=shape.proposals,
            rpn_post_nms_top_n_test=shape.proposals,
            box_batch_size_per_image=box_batch_size,
            box_score_thresh=shape.score_threshold,
        )
        transform: Any = self.network.transform
        transform.paste_masks = False  # done here, at the size of the file
        self.register_buffer("mean", torch.tensor(shape.mean), persistent=False)
        self.register_buffer("std", torch.tensor(shape.std), persistent=False)

    def forward(
        self, images: Sequence[Normalized], objects: Sequence[Objects] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        if self.training:
            assert objects is not None, "training needs the objects of the images"
            return self.network(list(images), [_target(each) for each in objects])
        return self._found(images, [(image.shape[1], image.shape[2]) for image in images])

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Loaded], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Detect the objects in loaded images.

        images: uint8, or float32 on a scale of 0 to 255, with a longer side of image_size. sizes:
        (height, width) of their files, in whose pixels the detections are returned, on the CPU.
        """
        return self._found([self.normalize(image) for image in images], sizes)

    def normalize(self, image: Loaded) -> Normalized:
        """Normalise a loaded image, on the model's device."""
        return normalize(image.to(self.mean.device), self.mean, self.std)

    def preprocess(self, picture: Any) -> Normalized:
        """Resize the longer side to image_size, and normalise.

        picture: a Pillow image, the path of an image file, or an array, uint8 or uint16 [H W C] or
        [H W]. Raises UserError if it cannot be read.
        """
        return self.normalize(self._loaded(picture)[0])

    def predict(self, picture: Any) -> Detections:
        """The objects in a picture (see `preprocess`), in its own pixels."""
        image, size = self._loaded(picture)
        return self.detect([image], [size])[0]

    def save(self, path: Path) -> None:
        """Write a safetensors file, and its JSON beside it."""
        about = {"kind": KIND, **self.shape.to_json(), "hpm": __version__}
        write_tensors(path, self.state_dict(), about)
        write_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_file(cls, path: Path, tensors: StateDict, about: Mapping[str, Any]) -> DetectionModel:
        """The model in a file written by `save`, in evaluation mode."""
        model = cls(DetectorShape.from_json(about, path))
        load_exactly(model, tensors, path)
        return model.eval()

    def _found(
        self, images: Sequence[Normalized], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        found = self.network(list(images))
        return [
            _scaled({name: x.cpu() for name, x in each.items()}, image.shape[1:], size)
            for each, image, size in zip(found, images, sizes, strict=True)
        ]

    def _loaded(self, picture: Any) -> tuple[Loaded, tuple[int, int]]:
        """(the loaded and resized picture, its (height, width))."""
        name = str(picture) if isinstance(picture, (str, Path)) else "the picture"
        try:
            image = opened(picture)
            side = self.image_size
            return whole_image(image, self.channels, side, side, deep=is_deep(image))
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{name} cannot be used: {one_line(error)}") from None


def _target(found: Objects) -> dict[str, Tensor]:
    """Objects in torchvision's format, where class 0 is the background."""
    target = {"boxes": found.boxes, "labels": found.classes + 1}
    return target if found.masks is None else target | {"masks": found.masks.to(torch.uint8)}


def _scaled(found: dict[str, Tensor], seen: Sequence[int], size: tuple[int, int]) -> Detections:
    """torchvision's detections in an image of size `seen`, scaled to the pixels of its file."""
    (rows, columns), (height, width) = seen, size
    boxes = found["boxes"] * torch.tensor([width / columns, height / rows] * 2)
    masks = _pasted(found["masks"], boxes, size) if "masks" in found else None
    return Detections(boxes, found["scores"], found["labels"] - 1, masks)


def _pasted(
    masks: Float[Tensor, "detections 1 _ _"],
    boxes: Float[Tensor, "detections 4"],
    size: tuple[int, int],
) -> Bool[Tensor, "detections height width"]:
    """Paste the masks of boxes into masks of the image."""
    heads = need("torchvision.models.detection.roi_heads", "dense", "detection")
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool)
    for start in range(0, len(masks), PASTED_AT_A_TIME):
        some = slice(start, start + PASTED_AT_A_TIME)
        probability = heads.paste_masks_in_image(masks[some], boxes[some], size)
        pasted[some] = probability[:, 0] >= MASK_THRESHOLD
    return pasted

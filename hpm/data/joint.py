"""Joint transforms of images and their annotations, built on torchvision's `tv_tensors`.

Every random choice is a function of (seed, epoch, sample index): torchvision draws from PyTorch's
global generator, which is seeded with these for each sample and restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.data.arrays import Opened, Pixels, UnreadableImage, at_depth, in_units_of_255, recoloured
from hpm.data.detection import Objects, image_size, objects
from hpm.data.loader import IMAGENET_MEAN, Key
from hpm.data.mask_files import IGNORED
from hpm.data.segmentation import check_size, label_map
from hpm.data.sources import Source
from hpm.data.transforms import decode

JOB = "segmentation and detection"
CROP_ATTEMPTS = 10  # before a crop that one class dominates is accepted
Target = TypeVar("Target")
Image = Shaped[Tensor, "channels height width"]  # uint8, or float32 with 255 for full scale


@dataclass
class _Views:
    """Base class: reads images and their annotations.

    channels: number of image channels. deep: return float32 rather than uint8; full scale is 255 in
    both.
    """

    channels: int = 3
    deep: bool = False

    def image(self, source: Source, index: int) -> Image:
        pixels = decode(source.open(index), self.channels)
        return torch.from_numpy(_full_image(pixels, self.deep))

    def labels(self, source: Source, index: int, image: Image) -> UInt8[Tensor, "height width"]:
        labels = label_map(source, index)
        check_size(source, index, labels.shape, (image.shape[1], image.shape[2]))
        return torch.from_numpy(labels)

    def objects(self, source: Source, index: int, image: Image) -> Objects:
        annotated, (height, width) = image_size(source, index), image.shape[1:]
        if annotated != (height, width):
            raise UserError(
                f"{source.path(index)}: {width}x{height} pixels, but its annotations are for "
                f"{annotated[1]}x{annotated[0]}"
            )
        return objects(source, index)


@dataclass
class SegmentationTraining(_Views):
    """Random resize, random crop to a fixed size, horizontal flip and photometric distortion.

    Args:
        size: (height, width) of the crop. Smaller images are padded; padding is ignored in labels.
        seed: seed of all random choices.
        scale: range of the resize factor, relative to the scale at which the image's shorter side
            equals the crop's shorter side.
        most_of_one_class: draw another crop (up to 10 times) if one class covers more than this
            share of the labelled pixels.
        flip: flip horizontally with probability 0.5.
        distort: change brightness, contrast, saturation and hue, each with probability 0.5. Only
            for images of 1 or 3 channels.
        fill: padding value of each channel, on a scale of 0 to 255.
    """

    size: tuple[int, int] = (512, 512)
    seed: int = 0
    scale: tuple[float, float] = (0.5, 2.0)
    most_of_one_class: float = 0.75
    flip: bool = True
    distort: bool = True
    fill: Sequence[float] = ()

    def __call__(self, source: Source, key: Key) -> tuple[Image, UInt8[Tensor, "height width"]]:
        tv = need("torchvision.tv_tensors", "dense", JOB)
        image = self.image(source, key[1])
        labels = self.labels(source, key[1], image)
        with seeded(self.seed, key):
            view, mask = self._resize(tv.Image(image), tv.Mask(labels[None]))
            view, mask = self._crop_varied(view, mask)
            view, mask = self._flip(view, mask)
            view = self._distort(_plain(view))
        return view, _plain(mask)[0]

    def _crop_varied(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(CROP_ATTEMPTS):
            view, cropped = self._crop(image, mask)
            counts = np.bincount(cropped.numpy().ravel(), minlength=256)[:IGNORED]
            if counts.max() <= self.most_of_one_class * counts.sum():
                break
        return view, cropped

    def _distort(self, image: Tensor) -> Tensor:
        if not self.distort or self.channels not in (1, 3):
            return image
        if not self.deep:
            return self._distortion(image)
        # torchvision clamps floating-point images to [0, 1]. Images in other units, such as
        # Hounsfield units, are scaled by their own range.
        low, high = (float(value) for value in image.aminmax())
        if low >= 0 and high <= 255:
            low, high = 0.0, 255.0
        if low == high:
            return image
        return self._distortion((image - low) / (high - low)) * (high - low) + low

    @cached_property
    def _resize(self) -> Any:
        low, high = (max(1, round(s * min(self.size))) for s in self.scale)
        return _v2().RandomResize(low, high + 1)

    @cached_property
    def _crop(self) -> Any:
        return _random_crop(self.size, _fill(self.fill, self.channels, self.deep), IGNORED)

    @cached_property
    def _flip(self) -> Any:
        return _v2().RandomHorizontalFlip(0.5 if self.flip else 0)

    @cached_property
    def _distortion(self) -> Any:
        # The strengths of SSD (Liu et al., 2016), common in segmentation, without its channel swap.
        v2 = _v2()
        steps = [
            v2.ColorJitter(brightness=0.125),
            v2.ColorJitter(contrast=0.5),
            v2.ColorJitter(saturation=0.5),
            v2.ColorJitter(hue=0.05),
        ]
        return v2.Compose([v2.RandomApply([step], 0.5) for step in steps])


@dataclass
class SegmentationTesting(_Views):
    """The full image with its shorter side resized to `size` (None: not resized), and labels at the
    original size. Predictions are resized to the original size for evaluation."""

    size: int | None = 512

    def __call__(self, source: Source, key: Key) -> tuple[Image, UInt8[Tensor, "rows columns"]]:
        image = self.image(source, key[1])
        labels = self.labels(source, key[1], image)
        return _resized(image, self.size, None), labels


@dataclass
class WholeImages(_Views):
    """The full image, resized as for testing, and its original (height, width). Needs no
    annotations."""

    size: int | None = 512
    longest: int | None = None

    def __call__(self, source: Source, key: Key) -> tuple[Image, tuple[int, int]]:
        image = self.image(source, key[1])
        height, width = image.shape[1:]
        return _resized(image, self.size, self.longest), (height, width)


@dataclass
class DetectionTraining(_Views):
    """Large-scale jitter (Ghiasi et al., 2021): random resize, random crop padded to a square,
    horizontal flip. Drops crowds and objects outside of the crop.

    Args:
        size: side of the square crop, in pixels.
        seed: seed of all random choices.
        scale: range of the resize factor, relative to the scale at which the image just fits into
            the crop.
        flip: flip horizontally with probability 0.5.
        fill: padding value of each channel, on a scale of 0 to 255.
    """

    size: int = 1024
    seed: int = 0
    scale: tuple[float, float] = (0.1, 2.0)
    flip: bool = True
    fill: Sequence[float] = ()

    def __call__(self, source: Source, key: Key) -> tuple[Image, Objects]:
        tv = need("torchvision.tv_tensors", "dense", JOB)
        image = self.image(source, key[1])
        height, width = image.shape[1:]
        if min(height, width) * self.size * self.scale[0] < max(height, width):
            raise UnreadableImage(f"{width}x{height} pixels, too long to be resized")
        found = self.objects(source, key[1], image)
        found = found.chosen(~found.crowd)
        inputs = {
            "image": tv.Image(image),
            "boxes": tv.BoundingBoxes(found.boxes, format="XYXY", canvas_size=(height, width)),
            "classes": found.classes,
            "masks": None if found.masks is None else tv.Mask(found.masks.to(torch.uint8)),
        }
        with seeded(self.seed, key):
            changed = self._change(inputs)
        return _plain(changed["image"]), _remaining_objects(changed)

    @cached_property
    def _change(self) -> Any:
        v2 = _v2()
        return v2.Compose(
            [
                v2.ScaleJitter((self.size, self.size), self.scale),
                _random_crop((self.size, self.size), _fill(self.fill, self.channels, self.deep), 0),
                v2.RandomHorizontalFlip(0.5 if self.flip else 0),
                v2.ClampBoundingBoxes(),
            ]
        )


@dataclass
class DetectionTesting(_Views):
    """The full image with its shorter side resized to `size` (None: not resized) and its longer
    side limited to `longest`, and the objects in original pixels. Predictions are scaled back to
    the original size for evaluation."""

    size: int | None = 1024
    longest: int | None = 1024

    def __call__(self, source: Source, key: Key) -> tuple[Image, Objects]:
        image = self.image(source, key[1])
        found = self.objects(source, key[1], image)
        return _resized(image, self.size, self.longest), found


@contextmanager
def seeded(seed: int, key: Key) -> Iterator[None]:
    """Seed PyTorch's global generator with (seed, epoch, index) inside the context."""
    word = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(word >> np.uint64(1)))
        yield


def _remaining_objects(changed: dict[str, Any]) -> Objects:
    """Objects that are visible in the crop. With masks, boxes are tightened to the masks."""
    boxes, masks = _plain(changed["boxes"]), changed["masks"]
    visible = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    if masks is not None:
        masks = _plain(masks).bool()
        visible &= masks.flatten(1).any(1)
        masks = masks[visible]
        boxes = need("torchvision.ops", "dense", JOB).masks_to_boxes(masks)
        boxes[:, 2:] += 1  # ends are exclusive
    else:
        boxes = boxes[visible]
    classes = changed["classes"][visible]
    return Objects(boxes.float(), classes, masks, torch.zeros(len(classes), dtype=torch.bool))


def whole_image(
    opened: Opened, channels: int, size: int | None, longest: int | None = None, deep: bool = False
) -> tuple[Image, tuple[int, int]]:
    """What `WholeImages` makes of one opened image. Raises OSError or UnreadableImage."""
    image = torch.from_numpy(_full_image(decode(opened, channels), deep))
    height, width = image.shape[1:]
    return _resized(image, size, longest), (height, width)


def _resized(
    image: Image, size: int | None, longest: int | None
) -> Shaped[Tensor, "channels new_height new_width"]:
    """Resize the shorter side to `size` (None: keep the image), but the longer one to at most
    `longest`."""
    if size is None:
        return image
    resize = _v2().functional.resize
    if longest is not None and size >= longest:
        # The limit on the longer side decides. It must be met exactly, so that the image fits into
        # the caller's buffer; torchvision would round the shorter side first.
        scale = longest / max(image.shape[1:])
        return resize(image, [max(1, round(side * scale)) for side in image.shape[1:]])
    return resize(image, [size], max_size=longest)


def _full_image(pixels: Pixels, deep: bool) -> np.ndarray:
    view = at_depth(in_units_of_255(pixels.array), deep)
    if len(view) != pixels.channels:
        view = recoloured(view, pixels.channels)
    return np.array(view, order="C")  # a copy: `view` may be memory-mapped from a file


def _fill(fill: Sequence[float], channels: int, deep: bool) -> list[float]:
    given = list(fill) or [255 * m for m in (IMAGENET_MEAN if channels == 3 else [0.5] * channels)]
    return given if deep else [round(value) for value in given]


def _random_crop(size: tuple[int, int], fill: list[float], outside: int) -> Any:
    """A random crop, padded with `fill` in images and `outside` in masks."""
    tv = need("torchvision.tv_tensors", "dense", JOB)
    fills = {tv.Image: fill, tv.Mask: outside, "others": 0}
    return _v2().RandomCrop(size, pad_if_needed=True, fill=fills)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _v2() -> Any:
    return need("torchvision.transforms.v2", "dense", JOB)

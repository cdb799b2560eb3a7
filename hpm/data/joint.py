"""Views of images whose annotations change with them, by torchvision's typed tensors.

Every random choice is a function of (seed, epoch, sample index): torchvision draws from PyTorch's
global generator, which is seeded by these for each sample and put back afterwards.
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
TRIES = 10  # of a crop in which no class covers nearly everything
Target = TypeVar("Target")
Image = Shaped[Tensor, "channels height width"]  # uint8, or float32 with 255 for full scale


@dataclass
class _Views:
    """What all views have in common.

    channels: of the images. deep: float32 rather than uint8, with 255 for full scale in both.
    """

    channels: int = 3
    deep: bool = False

    def image(self, source: Source, index: int) -> Image:
        pixels = decode(source.open(index), self.channels)
        return torch.from_numpy(_whole(pixels, self.deep))

    def labels(self, source: Source, index: int, image: Image) -> UInt8[Tensor, "height width"]:
        found = label_map(source, index)
        check_size(source, index, found.shape, (image.shape[1], image.shape[2]))
        return torch.from_numpy(found)

    def objects(self, source: Source, index: int, image: Image) -> Objects:
        told, (height, width) = image_size(source, index), image.shape[1:]
        if told != (height, width):
            raise UserError(
                f"{source.path(index)}: {width}x{height} pixels, but its annotations are for "
                f"{told[1]}x{told[0]}"
            )
        return objects(source, index)


@dataclass
class SegmentationTraining(_Views):
    """Crops of one size: random resize, random crop, horizontal flip, photometric distortion.

    Args:
        size: of the crop (height, width). What an image lacks is filled up, its labels ignored.
        seed: of all random choices.
        scale: the shorter side is resized to the crop's shorter side times a number from this
            range.
        most_of_one_class: a crop is drawn again (up to 10 times) where one class covers more than
            this share of its labelled pixels.
        flip: mirror half of the views.
        distort: change brightness, contrast, saturation and hue, each in half of the views; only of
            images of 1 or 3 channels.
        fill: of pixels outside of the image, per channel, 255 being full scale.
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
        for _ in range(TRIES):
            view, cropped = self._crop(image, mask)
            counts = np.bincount(cropped.numpy().ravel(), minlength=256)[:IGNORED]
            if counts.max() <= self.most_of_one_class * counts.sum():
                break
        return view, cropped

    def _distort(self, image: Tensor) -> Tensor:
        if not self.distort or self.channels not in (1, 3):
            return image
        if self.deep:  # floating point of torchvision: 1 is full scale
            return self._distortion(image / 255) * 255
        return self._distortion(image)

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
        # The strengths of SSD (Liu et al., 2016), which segmentation has taken over, without its
        # swapping of channels.
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
    """The whole image, its shorter side resized to `size` (None: as it is), and the labels at the
    size of the file, which predictions are resized to."""

    size: int | None = 512

    def __call__(self, source: Source, key: Key) -> tuple[Image, UInt8[Tensor, "rows columns"]]:
        image = self.image(source, key[1])
        labels = self.labels(source, key[1], image)
        return _resized(image, self.size, None), labels


@dataclass
class WholeImages(_Views):
    """The whole image, resized as for testing, and its (height, width) in the file: what can be
    predicted without annotations."""

    size: int | None = 512
    longest: int | None = None

    def __call__(self, source: Source, key: Key) -> tuple[Image, tuple[int, int]]:
        image = self.image(source, key[1])
        height, width = image.shape[1:]
        return _resized(image, self.size, self.longest), (height, width)


@dataclass
class DetectionTraining(_Views):
    """Large-scale jitter (Ghiasi et al., 2021): random resize, random crop filled up to a square,
    horizontal flip. Objects of which nothing is left are dropped, and so are crowds.

    Args:
        size: of the crop's sides.
        seed: of all random choices.
        scale: the image is resized to fit into the crop, times a number from this range.
        flip: mirror half of the views.
        fill: of pixels outside of the image, per channel, 255 being full scale.
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
        return _plain(changed["image"]), _left(changed)

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
    """The whole image, its shorter side resized to `size` (None: as it is) unless the longer would
    become more than `longest`, and the objects in the pixels of the file, which predictions are
    scaled back to."""

    size: int | None = 1024
    longest: int | None = 1024

    def __call__(self, source: Source, key: Key) -> tuple[Image, Objects]:
        image = self.image(source, key[1])
        found = self.objects(source, key[1], image)
        return _resized(image, self.size, self.longest), found


@contextmanager
def seeded(seed: int, key: Key) -> Iterator[None]:
    """PyTorch's global generator, seeded by (seed, epoch, index), and put back afterwards."""
    word = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(word >> np.uint64(1)))
        yield


def _left(changed: dict[str, Any]) -> Objects:
    """The objects that are still there; boxes fit tightly around what is left of the masks."""
    boxes, masks = _plain(changed["boxes"]), changed["masks"]
    there = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    if masks is not None:
        masks = _plain(masks).bool()
        there &= masks.flatten(1).any(1)
        masks = masks[there]
        boxes = need("torchvision.ops", "dense", JOB).masks_to_boxes(masks)
        boxes[:, 2:] += 1  # to the far edge of the last pixel
    else:
        boxes = boxes[there]
    classes = changed["classes"][there]
    return Objects(boxes.float(), classes, masks, torch.zeros(len(classes), dtype=torch.bool))


def whole_image(
    opened: Opened, channels: int, size: int | None, longest: int | None = None, deep: bool = False
) -> tuple[Image, tuple[int, int]]:
    """What `WholeImages` makes of one opened image. Raises OSError or UnreadableImage."""
    image = torch.from_numpy(_whole(decode(opened, channels), deep))
    height, width = image.shape[1:]
    return _resized(image, size, longest), (height, width)


def _resized(
    image: Image, size: int | None, longest: int | None
) -> Shaped[Tensor, "channels new_height new_width"]:
    if size is None:
        return image
    if longest is not None and size >= longest:
        # torchvision wants the longest side to be more than the shorter: it alone counts then.
        side = min(size, round(longest * min(image.shape[1:]) / max(image.shape[1:])))
        return _v2().functional.resize(image, [max(1, side)])
    return _v2().functional.resize(image, [size], max_size=longest)


def _whole(pixels: Pixels, deep: bool) -> np.ndarray:
    view = at_depth(in_units_of_255(pixels.array), deep)
    if len(view) != pixels.channels:
        view = recoloured(view, pixels.channels)
    return np.array(view, order="C")  # of its own: it may be mapped from a file


def _fill(fill: Sequence[float], channels: int, deep: bool) -> list[float]:
    given = list(fill) or [255 * m for m in (IMAGENET_MEAN if channels == 3 else [0.5] * channels)]
    return given if deep else [round(value) for value in given]


def _random_crop(size: tuple[int, int], fill: list[float], outside: int) -> Any:
    """A crop whose missing pixels are `fill`, and `outside` in masks."""
    tv = need("torchvision.tv_tensors", "dense", JOB)
    fills = {tv.Image: fill, tv.Mask: outside, "others": 0}
    return _v2().RandomCrop(size, pad_if_needed=True, fill=fills)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _v2() -> Any:
    return need("torchvision.transforms.v2", "dense", JOB)

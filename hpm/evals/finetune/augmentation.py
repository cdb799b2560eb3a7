"""Augmentation of fine-tuning: timm's RandAugment, random erasing, mixup and CutMix."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.data.arrays import ArrayImage, Opened
from hpm.data.loader import Key, MakeView, TrainingViews
from hpm.data.sources import Source
from hpm.data.transforms import View, augmented_view
from hpm.data.video.clips import ClipViews, image_or_clip
from hpm.evals.finetune import Options


@dataclass(frozen=True)
class FinetuneViews:
    """Random crop, flip and RandAugment by timm, a function of (seed, epoch, index)."""

    size: tuple[int, int]
    channels: int
    seed: int
    transform: Callable[[Image.Image], Any]

    def __call__(self, source: Source, key: Key) -> tuple[View, None]:
        seed_everything(self.seed, *key)
        return augmented_view(source.open(key[1]), self.channels, self.transform), None


@dataclass(frozen=True)
class FinetuneClipViews:
    """The same for clips, whose frames are all augmented alike. Views of one video share its
    decoded clip."""

    clips: ClipViews
    transform: Callable[[Image.Image], Any]

    @property
    def channels(self) -> int:
        return self.clips.channels

    def __call__(self, source: Source, key: Key) -> tuple[View, None]:
        clip, _ = self.clips.clip(source, key[0], key[1])
        frames = []
        for frame in clip.frames:
            seed_everything(self.clips.seed, *key)  # for each frame anew: the same choices
            frames.append(augmented_view(_opened(frame), self.channels, self.transform))
        return image_or_clip(np.stack(frames, 1)), None


def _opened(frame: np.ndarray) -> Opened:
    """A frame of a Clip [H W C] as an image."""
    if frame.dtype == np.uint8:
        return Image.fromarray(np.squeeze(frame, 2) if frame.shape[2] == 1 else frame)
    array = frame if frame.dtype == np.uint16 else frame / np.float32(255)
    return ArrayImage(lambda: array, array.shape, array.dtype, "YXC", colours=True)


def seed_everything(*key: int) -> None:
    """Seed all random generators that timm uses."""
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002
    torch.manual_seed(words[2])


class Augmentation:
    """The training views of fine-tuning, and the loss of a batch with timm's mixup, CutMix and
    random erasing."""

    def __init__(
        self,
        config: Options,
        mean: Tensor,
        views: TrainingViews | ClipViews,
        num_classes: int,
    ):
        """mean: of each channel [C], on a scale of 0 to 1, on the device. views: without
        RandAugment."""
        self.mean = mean
        data = need("timm.data", "finetune", "fine-tuning")
        erasing = need("timm.data.random_erasing", "finetune", "fine-tuning")
        self.config, self.num_classes = config, num_classes
        self.channels = views.channels
        self.views: MakeView = views
        if config.rand_augment != "none":
            transform = self._transform(views.size)
            self.views = (
                FinetuneClipViews(views, transform)
                if isinstance(views, ClipViews)
                else FinetuneViews(views.size, views.channels, config.seed, transform)
            )
        self.erase = None
        if config.random_erase > 0:
            device = str(self.mean.device)
            self.erase = erasing.RandomErasing(config.random_erase, mode="pixel", device=device)
        self.mix = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mix = data.Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def _transform(self, size: tuple[int, int]) -> Callable[[Image.Image], Any]:
        """Crop, flip and RandAugment."""
        config, mean = self.config, self.mean
        factory = need("timm.data.transforms_factory", "finetune", "fine-tuning")
        colours = mean.expand(3) if self.channels == 1 else mean
        try:
            transform = factory.transforms_imagenet_train(
                size,
                scale=config.crop_scale,
                hflip=0.5 if config.flip in (True, "horizontal", "both") else 0.0,
                vflip=0.5 if config.flip in ("vertical", "both") else 0.0,
                color_jitter=None,
                auto_augment=config.rand_augment,
                interpolation="bicubic",
                mean=tuple(colours.tolist()),  # fill colour of RandAugment
                normalize=False,
            )
        except (AssertionError, KeyError, ValueError):
            raise UserError(
                f"rand_augment is '{config.rand_augment}', which timm cannot read: write it as "
                "rand-m9-mstd0.5-inc1, or none"
            ) from None
        # Drop the last transform, the conversion to a tensor: `augmented_view` converts.
        transform.transforms.pop()
        for part in transform.transforms:
            keep_one_bit(getattr(part, "ops", ()))
        return transform

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, autocast: Callable[[], Any]
    ) -> Tensor:
        """Cross-entropy of a batch of normalised images or clips, erased and mixed."""
        smoothing = self.config.label_smoothing
        # Frames as channels [B C*T H W]: all frames of a clip have the same boxes.
        flat = images.flatten(1, -3)
        if self.erase is not None:
            flat = self.erase(flat)
        if self.mix is not None:
            flat, labels = self.mix(flat, labels)
            smoothing = 0.0  # timm's mixup has already smoothed the labels
        with autocast():
            logits = model(flat.reshape(images.shape))
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def keep_one_bit(operations: Iterable[Any]) -> None:
    """Let timm's posterize keep at least one bit: at its highest magnitudes it keeps none, which
    Pillow refuses."""
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_at_least_one, operation.level_fn)


def _at_least_one(level_fn: Callable[..., tuple[int]], *arguments: Any) -> tuple[int]:
    return (max(1, *level_fn(*arguments)),)

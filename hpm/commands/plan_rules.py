"""What `hpm plan` suggests, and why: rules from the images to the options of pretrain.

docs/first-run.md and docs/recipes.md describe them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hpm.core.config import PretrainConfig
from hpm.data.survey import Survey

IMAGE_SIZES = {224: 16, 160: 16, 128: 8, 96: 8, 64: 8, 32: 4}  # and their patches, in pixels
SMALLER = (160, 64)  # sizes that are tried where time is short
ENLARGED = 1.25  # at most, so that an image is not mostly interpolation
MODELS = ("vit_nano", "vit_tiny", "vit_small", "vit_base")
MODEL_IMAGES = {"vit_tiny": 2_000, "vit_small": 100_000}  # with fewer images, not a larger one
BATCHES = {64: 2_000, 128: 20_000}  # with fewer images, more steps rather than larger ones
SMALLEST_BATCH, LARGEST_BATCH = 64, 256
STEPS, EPOCHS = 10_000, (100, 800)  # the training has so many steps, but not too many epochs
STREAM_STEPS = 100_000
ENOUGH = 0.5  # of the recommended steps: with fewer, a smaller model is suggested
FRAMES, FRAME_PATCH, VIDEO_MASK_RATIO = 16, 2, 0.9  # VideoMAE's
VIDEO_EPOCHS = 800


@dataclass(frozen=True)
class Setting:
    """A model, what it sees, and in what batches."""

    model: str
    image_size: int
    patch_size: int
    batch_size: int
    channels: int
    frames: int = 1
    accumulate: int = 1

    def options(self) -> dict[str, Any]:
        """Options of pretrain, without its length."""
        clips = self.frames > 1
        options: dict[str, Any] = {
            "model": self.model,
            "image_size": self.image_size,
            "patch_size": (FRAME_PATCH, self.patch_size, self.patch_size)
            if clips
            else self.patch_size,
            "batch_size": self.batch_size,
        }
        if self.accumulate > 1:
            options["accumulate"] = self.accumulate
        if self.channels != 3:
            options["channels"] = self.channels
        if clips:
            options |= {"frames": self.frames, "mask_ratio": VIDEO_MASK_RATIO}
        return options

    def config(self, data: str, out: str, **length: Any) -> PretrainConfig:
        """The options of pretrain."""
        return PretrainConfig(data=data, out=out, **self.options() | length)

    def accumulated(self, parts: int) -> Setting:
        """The same in smaller parts, which need less memory."""
        return replace(self, accumulate=parts)


def training_images(found: Survey) -> int | None:
    """How many images are left to train on, without those held out and those that cannot be read;
    None for a stream."""
    if found.count is None:
        return None
    readable = found.count - round(len(found.unreadable) / max(1, found.looked_at) * found.count)
    return max(1, readable - min(128, readable // 10))


def largest(found: Survey, frames: int) -> Setting:
    """The largest setting that suits the images, however long it takes."""
    count = training_images(found)
    fitting = [size for size in IMAGE_SIZES if size <= ENLARGED * found.short_side]
    size = max(fitting, default=min(IMAGE_SIZES))
    model = next((m for m, n in MODEL_IMAGES.items() if count and count < n), MODELS[-1])
    batch = next((b for b, n in BATCHES.items() if count and count < n), LARGEST_BATCH)
    batch = min(batch, count or batch)
    return Setting(model, size, IMAGE_SIZES[size], batch, found.view_channels, frames)


def candidates(first: Setting) -> Iterator[Setting]:
    """The largest setting, then smaller ones: first smaller models, then smaller images, at last
    smaller batches."""
    sizes = [first.image_size, *[size for size in SMALLER if size < first.image_size]]
    models = MODELS[MODELS.index(first.model) :: -1]
    for size in sizes:
        for model in models:
            if model != MODELS[0] or size == sizes[-1]:
                smallest = replace(
                    first, model=model, image_size=size, patch_size=IMAGE_SIZES[size]
                )
                yield smallest
    yield replace(smallest, batch_size=min(first.batch_size, SMALLEST_BATCH))


def recommended_epochs(count: int, batch_size: int, frames: int) -> int:
    """As many epochs as make STEPS steps, within EPOCHS."""
    if frames > 1:
        return VIDEO_EPOCHS
    wanted = math.ceil(STEPS / max(1, count // batch_size))
    return max(EPOCHS[0], min(EPOCHS[1], wanted))

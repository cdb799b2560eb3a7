"""The built-in sources: images of `data/demo.py`, videos of `data/video/demo.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from hpm.data import demo
from hpm.data.video import demo as demo_video
from hpm.data.video.clip import Video, middle_frame
from hpm.data.video.sampling import ClipSampling


class BuiltIn:
    """What the built-in sources have in common. The samples of the classes take turns."""

    def __init__(self, name: str, split: str, classes: Sequence[str], size: int):
        self.name = f"{name} ({split})"
        self.split = split
        self.classes = list(classes)
        self.labels: np.ndarray | None = np.arange(size) % len(classes)
        self._folder, self._size = name, size

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> None:
        return None

    def is_deep(self) -> bool:
        return False

    def path(self, index: int) -> str:
        return f"{self._folder}/{self.split}/{index}"


class DemoSource(BuiltIn):
    """The built-in images."""

    def __init__(self, split: str):
        super().__init__("demo", split, demo.CLASSES, demo.SIZES[split])

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(demo.render(index, self.split).image)

    def mask(self, index: int) -> np.ndarray:
        """bool [H W], True on any object."""
        return demo.render(index, self.split).mask


class DemoVideos(BuiltIn):
    """The built-in videos."""

    holds_videos = True

    def __init__(self, split: str):
        super().__init__("demo-video", split, demo_video.CLASSES, demo_video.SIZES[split])

    def open_video(self, index: int) -> Video:
        return demo_video.DemoVideo(index, self.split)

    def open(self, index: int) -> Image.Image:
        return middle_frame(self.open_video(index))

    def mask(self, index: int) -> np.ndarray:
        """bool [H W], True on the object in the middle frame."""
        return self.clip_mask(index, ClipSampling(1, 1))[0]

    def clip_mask(self, index: int, sampling: ClipSampling) -> np.ndarray:
        """bool [T H W], True on the object in the clip in the middle."""
        length = demo_video.LENGTH
        numbers = sampling.numbers(sampling.segment_start(length, 0, 1))
        within = [min(number, length - 1) for number in numbers]
        return demo_video.render(index, self.split, within).masks

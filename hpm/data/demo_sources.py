"""The built-in sources: images of `data/demo.py`, videos of `data/video/demo.py`."""

from __future__ import annotations

import numpy as np
from PIL import Image

from hpm.data import demo
from hpm.data.video import demo as demo_video
from hpm.data.video.clip import Video, middle_frame
from hpm.data.video.sampling import ClipSampling


class DemoSource:
    """The built-in images."""

    def __init__(self, split: str):
        self.name = f"demo ({split})"
        self.split = split
        self.classes = list(demo.CLASSES)
        labels: np.ndarray = np.arange(demo.SIZES[split]) % len(demo.CLASSES)
        self.labels: np.ndarray | None = labels

    def __len__(self) -> int:
        return demo.SIZES[self.split]

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(demo.render(index, self.split).image)

    def read(self, index: int) -> None:
        return None

    def is_deep(self) -> bool:
        return False

    def path(self, index: int) -> str:
        return f"demo/{self.split}/{index}"

    def mask(self, index: int) -> np.ndarray:
        """bool [H W], True on any object."""
        return demo.render(index, self.split).mask


class DemoVideos:
    """The built-in videos."""

    holds_videos = True

    def __init__(self, split: str):
        self.name = f"demo-video ({split})"
        self.split = split
        self.classes = list(demo_video.CLASSES)
        labels: np.ndarray = np.arange(demo_video.SIZES[split]) % len(demo_video.CLASSES)
        self.labels: np.ndarray | None = labels

    def __len__(self) -> int:
        return demo_video.SIZES[self.split]

    def open_video(self, index: int) -> Video:
        return demo_video.DemoVideo(index, self.split)

    def open(self, index: int) -> Image.Image:
        return middle_frame(self.open_video(index))

    def read(self, index: int) -> None:
        return None

    def is_deep(self) -> bool:
        return False

    def path(self, index: int) -> str:
        return f"demo-video/{self.split}/{index}"

    def mask(self, index: int) -> np.ndarray:
        """bool [H W], True on the object in the middle frame."""
        return self.clip_mask(index, ClipSampling(1, 1))[0]

    def clip_mask(self, index: int, sampling: ClipSampling) -> np.ndarray:
        """bool [T H W], True on the object in the clip in the middle."""
        length = demo_video.LENGTH
        numbers = sampling.numbers(sampling.segment_start(length, 0, 1))
        within = [min(number, length - 1) for number in numbers]
        return demo_video.render(index, self.split, within).masks

"""A folder of numbered images as a video."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np

from hpm.core.errors import why
from hpm.data.arrays import Opened, UnreadableImage, in_units_of_255
from hpm.data.folders import IMAGE_SUFFIXES
from hpm.data.opening import open_image
from hpm.data.transforms import decode


def frame_number(name: str) -> int | None:
    """The last number in a file's name; None without one."""
    numbers = re.findall(r"\d+", os.path.splitext(name)[0])
    return int(numbers[-1]) if numbers else None


class FrameFolder:
    """The images of a folder in the order of their numbers; see hpm.data.video.clip.Video."""

    def __init__(self, folder: str):
        try:
            names = [n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES)]
        except OSError as error:
            raise UnreadableImage(why(error)) from error
        names = [name for name in names if not name.startswith(".")]
        if not names:
            raise UnreadableImage("no frames in this folder")
        names.sort(key=lambda name: (frame_number(name) or 0, name))
        self.files = [os.path.join(folder, name) for name in names]

    def close(self) -> None:
        pass

    @property
    def length(self) -> int:
        return len(self.files)

    def open(self, number: int) -> Opened:
        """One frame, not decoded yet."""
        return open_image(self.files[number])

    def read(
        self, numbers: Sequence[int], channels: int = 3, least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """[frames H W channels in the files]; see Video."""
        frames: list[np.ndarray] = []
        for number in numbers:
            if number >= self.length and frames:
                frames.append(frames[-1])
                continue
            file = self.files[min(number, self.length - 1)]
            pixels = decode(open_image(file), channels, least).array
            frames.append(pixels.transpose(1, 2, 0))
            if frames[-1].shape != frames[0].shape:
                height, width = frames[0].shape[:2]
                raise UnreadableImage(
                    f"{os.path.basename(file)} is {pixels.shape[2]}x{pixels.shape[1]} pixels, "
                    f"the frames before it {width}x{height}"
                )
        if all(frame.dtype.str[1:] == "u2" for frame in frames):
            return np.stack(frames).astype(np.uint16, copy=False)  # in the machine's byte order
        return np.stack([in_units_of_255(frame) for frame in frames])

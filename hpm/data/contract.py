"""What a source of images is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from hpm.data.arrays import Opened


@runtime_checkable
class Source(Protocol):
    """A fixed sequence of images, with or without labels.

    Loading processes share it: it must not change after it is made.
    """

    name: str  # for messages

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [images], indices into `classes`; None without labels. An attribute will do."""
        ...

    @property
    def classes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> Opened:
        """The image: a Pillow image, or what `hpm.data.opening.open_image` returns for a file or
        its bytes. Raises OSError or UnreadableImage."""
        ...

    def read(self, index: int) -> bytes | None:
        """The encoded image; None if it is not stored in an encoded form."""
        ...

    def is_deep(self) -> bool:
        """Whether images have more than 8 bits per channel. All views are then float32."""
        ...

    def path(self, index: int) -> str:
        """A name of the image for messages."""
        ...


SOURCE_MEMBERS = ("name", "labels", "classes", "__len__", "open", "read", "is_deep", "path")


@dataclass
class Splits:
    """The images to train on and, if there are any, the images to test on."""

    train: Source
    test: Source | None = None

    @property
    def test_or_all(self) -> Source:
        """The images to test on, or all images if there are no such."""
        return self.test or self.train

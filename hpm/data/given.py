"""Data sets that a program gives as objects: any sequence of images, such as torch's `Dataset`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from hpm.data.arrays import ArrayImage, Opened, UnreadableImage, reading
from hpm.data.inspection import any_deep

PREFIX = "dataset:"
_given: dict[str, Any] = {}  # of this process


def named(data: Any) -> Any:
    """The name by which `open_source` finds a data set of this process, or several sources in a
    list; anything else, such as a path, as it is."""
    if isinstance(data, list | tuple) and all(isinstance(d, str | os.PathLike) for d in data):
        return ",".join(map(os.fspath, data))
    if isinstance(data, str) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data
    name = f"{PREFIX}{type(data).__name__}"
    same = [known for known in _given if known.split(" ")[0] == name]
    found = next((known for known in same if _given[known] is data), None)
    name = found or (f"{name} {len(same) + 1}" if same else name)
    _given[name] = data
    return name


def given(name: str) -> GivenSource | None:
    """The images of a data set of this name; None if there is none."""
    return GivenSource(_given[name], name.removeprefix(PREFIX)) if name in _given else None


class GivenSource:
    """The images of a data set: items are images, `(image, label)`, or dictionaries with the image
    under `image` or `pixel_values`. Images are Pillow's, tensors [C H W] or arrays [H W C]. Labels
    are those of its `targets` and `classes`, if there is an integer for each image."""

    def __init__(self, dataset: Any, name: str):
        self.name = name
        self._dataset = dataset
        self.labels = _labels(getattr(dataset, "targets", None), len(dataset))
        self.classes: list[str] = []
        if self.labels is not None:
            numbers = range(int(self.labels.max()) + 1)
            self.classes = [str(each) for each in getattr(dataset, "classes", numbers)]

    def __len__(self) -> int:
        return len(self._dataset)

    def open(self, index: int) -> Opened:
        with reading((Exception,)):  # whatever the data set raises
            item = self._dataset[index]
            if isinstance(item, Mapping):
                item = item["image"] if "image" in item else item["pixel_values"]
            return _opened(item[0] if isinstance(item, tuple | list) else item)

    def read(self, index: int) -> None:
        return None

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"


def _labels(targets: Any, images: int) -> np.ndarray | None:
    """int64; None unless there is one integer for each image. Targets may be something else, such
    as the paths of masks in torchvision's VOCSegmentation."""
    try:
        labels = np.asarray(targets)
    except ValueError:  # lists of different lengths
        return None
    integers = labels.dtype.kind in "biu" and labels.shape == (images,)
    return labels.astype(np.int64) if integers else None


def _opened(image: Any) -> Opened:
    if isinstance(image, Image.Image):
        return image
    axes = "CYX" if isinstance(image, torch.Tensor) else "YXC"
    if not isinstance(image, torch.Tensor | np.ndarray):
        raise UnreadableImage(f"{type(image).__name__}, not an image, a tensor or an array")
    array = np.asarray(image)
    axes = "YX" if array.ndim == 2 else axes
    return ArrayImage(lambda: array, array.shape, array.dtype, axes)

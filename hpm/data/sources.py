"""Sources of images: folder, list file, parquet, Arrow, the built-in demo, or the user's own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from hpm.core.errors import UserError, one_line
from hpm.core.plugins import find_plugin, installed_plugins
from hpm.data import demo
from hpm.data.arrays import Opened
from hpm.data.folders import IMAGE_SUFFIXES, described, find_images, images_of
from hpm.data.inspection import any_deep
from hpm.data.notes import say_once
from hpm.data.opening import open_image
from hpm.data.paths import Paths
from hpm.data.tables import ArrowSource, ParquetSource, natural

PREPARING = "prepare.json"  # of `hpm prepare`: what it makes, and of what
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "valid", "test", "testing")
ENTRY_POINTS = "hpm.sources"  # functions without arguments that return a Source or Splits


@runtime_checkable
class Source(Protocol):
    """A fixed sequence of images, with or without labels.

    Loading processes share it: it must not change after it is made.
    """

    name: str  # for messages
    labels: np.ndarray | None  # int64 [images], indices into `classes`; None without labels
    classes: list[str]

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


def open_source(data: str, trusted: bool = True) -> Splits:
    """Open a data set.

    Args:
        data: a folder, list file, parquet file or folder, Arrow folder, one image, or `demo`;
            otherwise the name of an entry point of the group `hpm.sources`, or `module:function`.
        trusted: whether the user gave the name. If it comes from a file, no code that it names is
            imported.

    Raises UserError if there are no images.
    """
    if data == "demo":
        return Splits(DemoSource("train"), DemoSource("test"))
    path = Path(data).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        dotted = re.fullmatch(r"[\w.]+:[\w.]+", data)
        if trusted and (dotted or data in installed_plugins(ENTRY_POINTS)):
            return _open_own(data)
        raise UserError(
            f"{data}: no such folder or file; name a folder of images, a list file, parquet or demo"
        )
    if path.suffix.lower() == ".parquet":
        return Splits(ParquetSource(str(path), [path]))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Splits(FileSource(str(path), [path], root=path.parent))
    return Splits(_open_list(path))


def _open_own(data: str) -> Splits:
    """Call the user's function. Raises UserError if it fails or returns something else."""
    make = find_plugin("data", data, ENTRY_POINTS, ("demo",))
    if not callable(make):
        raise UserError(f"data is '{data}': it is not a function")
    try:
        made = make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data {data} failed: {type(error).__name__}: {one_line(error)}") from error
    sources: list[Any] = [made.train, made.test] if isinstance(made, Splits) else [made]
    for source in sources:
        missing = [name for name in SOURCE_MEMBERS if not hasattr(source, name)]
        if source is not None and missing:
            raise UserError(
                f"data {data} must return a hpm.data.sources.Source or Splits, but "
                f"{type(source).__name__} lacks {', '.join(missing)}"
            )
        if source is not None and len(source) == 0:
            raise UserError(f"data {data} has no images")
    return Splits(*sources)


class FileSource:
    """Image files below `root`, which their names are relative to."""

    def __init__(
        self,
        name: str,
        paths: Iterable[Path | str],
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        root: Path | str = "",
    ):
        self.name = name
        self.root = str(root)
        self.paths = Paths(paths)
        self.labels = labels
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Opened:
        return open_image(self.paths[index])

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def is_deep(self) -> bool:
        return any_deep(self.open, len(self))

    def path(self, index: int) -> str:
        return self.paths[index]


class DemoSource:
    """The built-in images of `data/demo.py`."""

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


class Subset:
    """Some images of another source, in the given order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.name = source.name
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Opened:
        return self.source.open(int(self.indices[index]))

    def read(self, index: int) -> bytes | None:
        return self.source.read(int(self.indices[index]))

    def is_deep(self) -> bool:
        return self.source.is_deep()  # of the whole source, so that all its parts agree

    def path(self, index: int) -> str:
        return self.source.path(int(self.indices[index]))


def object_mask(source: Source, index: int) -> np.ndarray | None:
    """bool [H W], True on the objects of an image; None if the source has no masks."""
    if isinstance(source, Subset):
        return object_mask(source.source, int(source.indices[index]))
    if isinstance(source, DemoSource):
        return demo.render(index, source.split).mask
    return None


def hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Split a source at random: (the rest, `count` images)."""
    order = np.random.default_rng([seed, len(source)]).permutation(len(source))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def _open_folder(path: Path) -> Splits:
    if (path / "dataset_dict.json").exists():
        return _open_saved(path)
    if (path / PREPARING).exists():
        raise UserError(f"{path}: hpm prepare has not finished; run the same command again")
    if (path / "state.json").exists():
        return Splits(ArrowSource(str(path), path))
    files = sorted(path.rglob("*.parquet"))
    if files:
        train = [f for f in files if f.stem.lower().startswith(TRAIN_NAMES)]
        test = _first_test_split(files)
        if not train:
            return Splits(ParquetSource(str(path), files))
        return Splits(
            ParquetSource(f"{path} (train)", train),
            ParquetSource(f"{path} (test)", test) if test else None,
        )
    path = images_of(path)
    inside = {p.name.lower(): p for p in sorted(path.iterdir()) if p.is_dir()}
    if any((path / "annotations").glob("*.json")):  # COCO's names: train2017, val2017
        inside = {name.rstrip("0123456789"): p for name, p in inside.items()}
        inside.pop("annotations")
    train_folder = next((inside[n] for n in TRAIN_NAMES if n in inside), None)
    test_folder = next((inside[n] for n in TEST_NAMES if n in inside), None)
    # A folder `train` beside folders that are no splits may be a class (trains).
    if train_folder and (test_folder or len(inside) == 1):
        return Splits(
            _image_folder(train_folder), _image_folder(test_folder) if test_folder else None
        )
    return Splits(_image_folder(path))


def _open_saved(path: Path) -> Splits:
    """Splits saved by Hugging Face's `datasets` or `hpm prepare`."""
    try:
        names = list(map(str, json.loads((path / "dataset_dict.json").read_text())["splits"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = one_line(error)
        raise UserError(f"{path}: dataset_dict.json has no splits ({reason})") from error
    train = next((n for n in names if n.lower().startswith(TRAIN_NAMES)), None)
    test = next((n for wanted in TEST_NAMES for n in names if n.lower().startswith(wanted)), None)
    if train is None:
        raise UserError(f"{path}: no split train among {', '.join(names) or 'none'}")
    return Splits(
        ArrowSource(f"{path} (train)", path / train),
        ArrowSource(f"{path} (test)", path / test) if test else None,
    )


def _first_test_split(files: list[Path]) -> list[Path]:
    """Validation before test, as with folders: test labels are often withheld."""
    for name in TEST_NAMES:
        if found := [f for f in files if f.stem.lower().startswith(name)]:
            return found
    return []


def _image_folder(root: Path) -> FileSource:
    """All images below `root`, labelled by first-level folder if every image is in one."""
    root = images_of(root)
    files, others = find_images(root)
    if not files:
        looked_for = f" (looked for {' '.join(IMAGE_SUFFIXES)})"
        passed_over = f", but {described(others)}" if others else looked_for
        raise UserError(f"{root}: no images in this folder or below it{passed_over}")
    if others:
        say_once(f"{root}: passed over: {described(others)}")
    paths = [os.path.join(root, f) for f in files]
    tops = [f.split(os.sep)[0] if os.sep in f else None for f in files]
    classes = sorted({top for top in tops if top is not None})
    if None in tops or not classes:
        return FileSource(str(root), paths, root=root)
    numbers = {c: i for i, c in enumerate(classes)}
    labels = np.array([numbers[top] for top in tops if top is not None])
    return FileSource(str(root), paths, labels, classes, root)


def _open_list(path: Path) -> FileSource:
    """`path label` per line, the label optional; paths are relative to the list's folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: neither a folder, parquet, an image nor a text list of images"
        ) from None
    paths, names = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, label = _split_line(path.parent, line.strip())
        if image is None:
            raise UserError(f"{path}, line {number}: no such image: {line.strip()}")
        paths.append(image)
        names.append(label)
    if not paths:
        raise UserError(f"{path}: the list is empty")
    if all(n is None for n in names):
        return FileSource(str(path), paths, root=path.parent)
    if None in names:
        raise UserError(f"{path}: some lines have a label and some have none")
    classes = sorted({n for n in names if n is not None}, key=natural)
    numbers = {c: i for i, c in enumerate(classes)}
    labels = np.array([numbers[n] for n in names if n])
    return FileSource(str(path), paths, labels, classes, path.parent)


def _split_line(folder: Path, line: str) -> tuple[str | None, str | None]:
    """(image, label) of a line. A path may contain spaces. The image is None if it is missing."""
    path, _, label = line.rpartition(" ")
    if path and os.path.isfile(folder / path.strip()):
        return str(folder / path.strip()), label
    return (str(folder / line), None) if os.path.isfile(folder / line) else (None, None)

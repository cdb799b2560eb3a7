"""Images with a label for every pixel: folders of masks, ADE20K, Pascal VOC, the built-in demo."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hpm.core.errors import UserError
from hpm.data import demo
from hpm.data.arrays import UnreadableImage
from hpm.data.fingerprint import contents_digest, digest
from hpm.data.folders import subfolders
from hpm.data.inspection import spaced
from hpm.data.mask_files import Labels, highest_label, pair_by_name, read_mask
from hpm.data.notes import say_once
from hpm.data.paths import Paths
from hpm.data.sources import DemoSource, FileSource, Source, Splits, Subset
from hpm.data.splits import is_split, pick_splits
from hpm.data.transforms import decode

MASK_FOLDERS = ("masks", "annotations", "labels")
IGNORED_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")
LOOKED_FOR = (
    "SPLIT/images with SPLIT/masks, images with masks, images/SPLIT with masks/SPLIT, "
    "images/training with annotations/training (ADE20K), "
    "JPEGImages with SegmentationClass and ImageSets/Segmentation (Pascal VOC)"
)
ADE20K_CLASSES = 150
MASKS_CHECKED = 8  # per split, when it is opened
VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv monitor",
)


class MaskedImages(FileSource):
    """Image files, each with a mask file. `classes` are those of the pixels."""

    def __init__(
        self,
        name: str,
        images: Iterable[Path],
        masks: Iterable[Path | str],
        numbers: Labels,
        root: Path,
    ):
        super().__init__(name, images, classes=numbers.names, root=root)
        self.masks = Paths(masks)
        self.numbers = numbers

    def label_map(self, index: int) -> UInt8[np.ndarray, "height width"]:
        file = self.masks[index]
        return self.numbers.apply(read_mask(file), file)

    def annotations_digest(self) -> str:
        meaning = [*self.numbers.table.tolist(), self.numbers.one_class]
        return digest([contents_digest(self.masks), *map(str, meaning)])


class DemoLabels(DemoSource):
    """The built-in images; pixel classes are `background` and the object classes."""

    def __init__(self, split: str):
        super().__init__(split)
        self.labels = None
        self.classes = ["background", *demo.CLASSES]
        self._last: tuple[int, demo.DemoImage] | None = None

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._drawn(index).image)

    def label_map(self, index: int) -> UInt8[np.ndarray, "height width"]:
        drawn = self._drawn(index)
        return drawn.mask.astype(np.uint8) * np.uint8(drawn.label + 1)

    def _drawn(self, index: int) -> demo.DemoImage:
        """Cache the last sample: its image and mask are read one after the other."""
        if self._last is None or self._last[0] != index:
            self._last = index, demo.render(index, self.split)
        return self._last[1]


def label_map(source: Source, index: int) -> UInt8[np.ndarray, "height width"]:
    """Index into `source.classes`, or IGNORED, of every pixel of an image.

    Raises UserError if the labels are wrong, UnreadableImage if the file is not an image, and
    ValueError if the source has no masks.
    """
    if isinstance(source, Subset):
        return label_map(source.source, int(source.indices[index]))
    if isinstance(source, MaskedImages | DemoLabels):
        return source.label_map(index)
    raise ValueError(f"{source.name} has no labels of pixels")


def check_size(source: Source, index: int, shape: tuple[int, ...], image: tuple[int, int]) -> None:
    """Raise UserError if a mask of `shape` differs in size from its image (height, width)."""
    if shape != image:
        raise UserError(
            f"{source.path(index)}: its mask is {shape[1]}x{shape[0]} pixels, the image "
            f"{image[1]}x{image[0]}; both must be of one size"
        )


def open_segmentation(
    data: str, ignored: int | None = None, one_class: bool | None = None
) -> Splits:
    """Open a folder of images and masks in any of the known layouts.

    Args:
        data: the folder, or `demo`.
        ignored: a label to leave out of training and metrics, in addition to 255. Default: the
            class named `void` (or `unlabeled`, ...) in classes.txt; 0 for ADE20K.
        one_class: masks number the objects; treat all of them as one class. Default: true if
            annotations/instances_*.json has a single category.

    Class names come from `classes.txt` (one per line, the first for label 0) or `classes.json` (a
    list, or names by label). Without either, the number of classes follows from the highest label
    in the training masks. Raises UserError for an unknown layout or wrong masks.
    """
    if data == "demo":
        return Splits(DemoLabels("train"), DemoLabels("test"))
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"{data}: no such folder; name a folder of images and masks, or demo")
    train, test = _open_voc(root) or _open_folders(root)
    numbers = _labels(root, train, ignored, one_class)
    splits = Splits(train.source(numbers, root), test.source(numbers, root) if test else None)
    for source in filter(None, (splits.train, splits.test)):
        check_masks(source)
    return splits


def check_masks(source: Source, count: int = MASKS_CHECKED) -> None:
    """Check `count` images and masks, evenly spaced. Raises UserError if they do not match."""
    for index in spaced(len(source), count):
        with suppress(UnreadableImage, OSError):  # counted while loading
            shape = label_map(source, index).shape
            image = decode(source.open(index), 3)
            check_size(source, index, shape, (image.height, image.width))


@dataclass
class _Part:
    """Images and masks of one split."""

    name: str
    images: list[Path]
    masks: list[Path]
    ade20k: bool = False
    voc: bool = False

    def source(self, numbers: Labels, root: Path) -> MaskedImages:
        return MaskedImages(self.name, self.images, self.masks, numbers, root)


def _open_folders(root: Path) -> tuple[_Part, _Part | None]:
    """Folders of images beside folders of masks."""
    pairs: dict[str, tuple[Path, Path]] = {}
    bare: list[str] = []
    splits = [p.name for p in subfolders(root) if (p / "images").is_dir()]
    forms = [(name, root / name / "images", root / name, "") for name in splits]
    if (root / "images").is_dir():
        inside = [p.name for p in subfolders(root / "images")]
        names = [name for name in inside if is_split(name)]
        forms += [(name, root / "images" / name, root, name) for name in names]
        if not names:
            forms.append(("", root / "images", root, ""))
    for name, images, beside, below in forms:
        masks = (beside / folder / below for folder in MASK_FOLDERS)
        found = next((folder for folder in masks if folder.is_dir()), None)
        if found is None:
            bare.append(name)
        else:
            pairs[name] = images, found
    if not pairs:
        raise UserError(f"{root}: no images with masks (looked for {LOOKED_FOR})")
    if "" in pairs:
        return _paired(root, "", *pairs[""]), None
    named = {name: (name, *folders) for name, folders in pairs.items()}
    train, test = pick_splits(named, bare, root, "masks")
    return _paired(root, *train), _paired(root, *test) if test else None


def _paired(root: Path, split: str, images: Path, masks: Path) -> _Part:
    name = f"{root} ({split})" if split else str(root)
    ade20k = masks.parent.name == "annotations" and split == "training"
    return _Part(name, *pair_by_name(images, masks), ade20k=ade20k)


def _open_voc(root: Path) -> tuple[_Part, _Part | None] | None:
    lists = root / "ImageSets" / "Segmentation"
    if not ((root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir()):
        return None
    files = {file.stem: file for file in sorted(lists.glob("*.txt"))}
    if not files:
        raise UserError(f"{root}: no lists of splits in ImageSets/Segmentation (train.txt, ...)")
    # The masks of VOC's test split are not public.
    named = {name: file for name, file in files.items() if name.lower() != "test"}
    train, test = pick_splits(named, files.keys() - named.keys(), root, "masks")
    return _listed(root, train), _listed(root, test) if test else None


def _listed(root: Path, file: Path) -> _Part:
    """The images named in one of VOC's lists."""
    names = [
        line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()
    ]
    if not names:
        raise UserError(f"{file}: the list names no image")
    part = _Part(f"{root} ({file.stem})", [], [], voc=True)
    for name in names:
        image, mask = root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png"
        for wanted in (image, mask):
            if not wanted.is_file():
                raise UserError(f"{file} names {name}, but there is no {wanted}")
        part.images.append(image)
        part.masks.append(mask)
    return part


def _labels(root: Path, train: _Part, ignored: int | None, one_class: bool | None) -> Labels:
    """Choose the mapping from the numbers in the masks to classes."""
    category = _single_category(root)
    if one_class or (one_class is None and category):
        names = {0: "background", 1: category or "object"}
        return Labels.of(names, {ignored}, one_class=True)
    known = _names(root)
    if ignored is None:
        ignored = next((k for k, name in known.items() if name.lower() in IGNORED_NAMES), None)
    if known:
        return Labels.of(known, {ignored})
    if train.ade20k:
        if ignored is None:
            ignored = 0
            say_once(f"{root}: read as ADE20K: label 0 is ignored")
        return Labels.of(_ade20k_names(root, train, ignored), {ignored})
    highest = highest_label(train.masks, {255, ignored})
    if train.voc and highest == len(VOC_CLASSES) - 1:
        return Labels.of(dict(enumerate(VOC_CLASSES)), {ignored})
    return Labels.of({k: f"class {k}" for k in range(highest + 1)}, {ignored})


def _names(root: Path) -> Mapping[int, str]:
    """Class names by label, from a file; empty if there is none."""
    text, table = root / "classes.txt", root / "classes.json"
    if text.is_file():
        lines = text.read_text(encoding="utf-8-sig").rstrip().splitlines()
        return {number: line.strip() for number, line in enumerate(lines)}
    if not table.is_file():
        return {}
    try:
        content = json.loads(table.read_text(encoding="utf-8-sig"))
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {int(number): str(name) for number, name in pairs}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{table}: neither a JSON list of class names nor names by label") from None


def _ade20k_names(root: Path, train: _Part, ignored: int) -> Mapping[int, str]:
    """Class names from ADE20K's tab-separated table; numbered if there is none."""
    table = root / "objectInfo150.txt"
    if table.is_file():
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8-sig").splitlines()]
        with suppress(ValueError, IndexError):
            return {int(row[0]): row[-1].split(",")[0].strip() for row in rows[1:]}
        raise UserError(f"{table}: not the table of ADE20K (Idx, Ratio, Train, Val, Name)")
    whole = train.images[0].name.startswith("ADE_")
    highest = ADE20K_CLASSES if whole else highest_label(train.masks, {255, ignored})
    return {k: f"class {k}" for k in range(highest + 1)}


def _single_category(root: Path) -> str | None:
    """The category in COCO's JSON beside the masks, if it is the only one."""
    for file in sorted((root / "annotations").glob("instances_*.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):
            categories = json.loads(file.read_text())["categories"]
            return str(categories[0]["name"]) if len(categories) == 1 else None
    return None

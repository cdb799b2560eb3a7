"""Images with object boxes and masks: COCO's JSON in its usual folders, the built-in demo."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from hpm.core.errors import UserError, counted
from hpm.data import demo
from hpm.data.coco import CocoFile, read_coco
from hpm.data.fingerprint import digest
from hpm.data.folders import subfolders
from hpm.data.notes import say_once
from hpm.data.paths import Paths
from hpm.data.rle import decode_masks, encode_masks, mask_library
from hpm.data.sources import DemoSource, FileSource, Source, Splits, Subset
from hpm.data.splits import is_split, pick_splits

LOOKED_FOR = (
    "annotations/instances_SPLIT.json with images in SPLIT, SPLIT/images or images/SPLIT; "
    "SPLIT/_annotations.coco.json; annotations.json with images"
)
INSTANCES = "instances_"


@dataclass
class Objects:
    """The objects of one image.

    boxes: x0, y0, x1, y1 in pixels, ends exclusive. classes: indices into the source's `classes`.
    masks: None if there are only boxes. crowd: True for a box around a group of objects, which the
    metrics ignore.
    """

    boxes: Float[Tensor, "objects 4"]
    classes: Int[Tensor, " objects"]
    masks: Bool[Tensor, "objects height width"] | None
    crowd: Bool[Tensor, " objects"]

    def __len__(self) -> int:
        return len(self.classes)

    def chosen(self, which: Bool[Tensor, " objects"] | Int[Tensor, " chosen"]) -> Objects:
        masks = None if self.masks is None else self.masks[which]
        return Objects(self.boxes[which], self.classes[which], masks, self.crowd[which])

    def to(self, device: torch.device | str) -> Objects:
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        boxes, classes, crowd = (
            x.to(device, non_blocking=True) for x in (self.boxes, self.classes, self.crowd)
        )
        return Objects(boxes, classes, masks, crowd)

    def pin_memory(self) -> Objects:
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(
            self, boxes=self.boxes.pin_memory(), classes=self.classes.pin_memory(), masks=masks
        )


@dataclass
class Detections:
    """What was found in one image, in the pixels of its file.

    boxes: x0, y0, x1, y1. classes: numbers into the source's `classes`. masks: None of a detector
    of boxes.
    """

    boxes: Float[Tensor, "detections 4"]
    scores: Float[Tensor, " detections"]
    classes: Int[Tensor, " detections"]
    masks: Bool[Tensor, "detections height width"] | None = None


def to_results(index: int, found: Detections) -> list[dict[str, Any]]:
    """The detections of an image, by its index in the source, as COCO's JSON of results."""
    corners = found.boxes.double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    codes: Sequence[Any] = [None] * len(boxes)
    if found.masks is not None:
        codes = encode_masks(found.masks.cpu().numpy())
    rows = zip(found.classes.tolist(), found.scores.tolist(), boxes, codes, strict=True)
    return [
        {"image_id": index, "category_id": number, "score": score, "bbox": box}
        | ({} if code is None else {"segmentation": code})
        for number, score, box, code in rows
    ]


class CocoImages(FileSource):
    """Image files and their objects. `classes` are the categories, in the order of their ids.

    has_masks: whether every object has a mask.
    """

    def __init__(self, name: str, folder: Path, content: CocoFile, has_masks: bool):
        files = [folder / file for file in content.files]
        super().__init__(name, files, classes=content.classes, root=folder)
        self.has_masks = has_masks
        self.sizes = content.sizes
        # JSON text in one array, which workers share; they would copy nested lists.
        self._objects = Paths(map(json.dumps, content.objects))

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index]
        return int(height), int(width)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Checked annotations in COCO's format, with an added key `class`, the class index."""
        return json.loads(self._objects[index])

    def annotations_digest(self) -> str:
        return digest(self._objects)

    def objects(self, index: int) -> Objects:
        found, (height, width) = self.annotations(index), self.size(index)
        boxes = np.array([a["bbox"] for a in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
        masks = None
        if self.has_masks:
            masks = torch.from_numpy(
                decode_masks([a["segmentation"] for a in found], height, width)
            )
        return Objects(
            torch.from_numpy(boxes),
            torch.tensor([a["class"] for a in found], dtype=torch.int64),
            masks,
            torch.tensor([bool(a["iscrowd"]) for a in found], dtype=torch.bool),
        )


class DemoObjects(DemoSource):
    """The built-in images, with a box and a mask of every object."""

    has_masks = True

    def __init__(self, split: str):
        super().__init__(split)
        self.labels = None
        self._last: tuple[int, demo.DemoImage] | None = None

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._drawn(index).image)

    def size(self, index: int) -> tuple[int, int]:
        height, width, _ = self._drawn(index).image.shape
        return height, width

    def objects(self, index: int) -> Objects:
        drawn = self._drawn(index)
        count = len(drawn.boxes)
        return Objects(
            torch.tensor(drawn.boxes, dtype=torch.float32),
            torch.full((count,), drawn.label),
            torch.from_numpy(drawn.masks),
            torch.zeros(count, dtype=torch.bool),
        )

    def annotations(self, index: int) -> list[dict[str, Any]]:
        drawn = self._drawn(index)
        boxes = np.concatenate([drawn.boxes[:, :2], drawn.boxes[:, 2:] - drawn.boxes[:, :2]], 1)
        return [
            {
                "bbox": box,
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": code,
                "class": drawn.label,
            }
            for box, mask, code in zip(
                boxes.tolist(), drawn.masks, encode_masks(drawn.masks), strict=True
            )
        ]

    def _drawn(self, index: int) -> demo.DemoImage:
        if self._last is None or self._last[0] != index:
            self._last = index, demo.render(index, self.split)
        return self._last[1]


def objects(source: Source, index: int) -> Objects:
    """The objects of an image. Raises ValueError if the source has no annotations of objects."""
    whole, index = _whole(source, index)
    return whole.objects(index)


def has_masks(source: Source) -> bool:
    return _whole(source, 0)[0].has_masks


def image_size(source: Source, index: int) -> tuple[int, int]:
    """(height, width) of an image according to its annotations."""
    whole, index = _whole(source, index)
    return whole.size(index)


def ground_truth(source: Source, indices: Iterable[int] | None = None) -> dict[str, Any]:
    """The annotations of a source in COCO's format.

    The id of an image is its index, the id of a category its class index. With `indices`, only
    these images are included.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(source)) if indices is None else indices:
        whole, inner = _whole(source, index)
        height, width = whole.size(inner)
        images.append({"id": index, "height": height, "width": width})
        for found in whole.annotations(inner):
            number = found.pop("class")
            annotations.append(
                found | {"id": len(annotations) + 1, "image_id": index, "category_id": number}
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(source.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _whole(source: Source, index: int) -> tuple[CocoImages | DemoObjects, int]:
    if isinstance(source, Subset):
        return _whole(source.source, int(source.indices[index]))
    if isinstance(source, CocoImages | DemoObjects):
        return source, index
    raise ValueError(f"{source.name} has no boxes")


def open_detection(data: str) -> Splits:
    """Open a folder of images with COCO's JSON, in whichever of the known layouts it is, or `demo`.

    Masks are left out, of all images, where some objects have none. Raises UserError where the
    folder has no known layout, or where the annotations are wrong.
    """
    if data == "demo":
        return Splits(DemoObjects("train"), DemoObjects("test"))
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{data}: no such folder; name a folder of images with COCO's JSON, or demo"
        )
    train, test = _find_files(root)
    parts = [(part, read_coco(part.file, part.folder)) for part in (train, test) if part]
    classes = parts[0][1].classes
    if any(content.classes != classes for _, content in parts):
        raise UserError(f"{parts[1][0].file}: its categories are not those of {parts[0][0].file}")
    has_masks = _all_have_masks(root, [content for _, content in parts])
    if has_masks:
        mask_library()  # if it is missing, fail here rather than in a worker
    return Splits(*(CocoImages(part.name, part.folder, c, has_masks) for part, c in parts))


@dataclass
class _Part:
    """The annotation file and image folder of one split."""

    name: str
    file: Path
    folder: Path


def _all_have_masks(root: Path, contents: list[CocoFile]) -> bool:
    found = [bool(a["segmentation"]) for c in contents for image in c.objects for a in image]
    if any(found) and not all(found):
        without = counted(len(found) - sum(found), "object")
        say_once(f"{root}: {without} of {len(found)} without a mask, so masks are left out")
    return all(found) and len(found) > 0


def _find_files(root: Path) -> tuple[_Part, _Part | None]:
    parts: dict[str, _Part] = {}
    for file in sorted((root / "annotations").glob(f"{INSTANCES}*.json")):
        split = file.stem.removeprefix(INSTANCES)
        folders = (root / split / "images", root / "images" / split, root / split)
        folder = next((f for f in folders if f.is_dir()), None)
        if folder is None:
            raise UserError(f"{file}: no folder {root / split} of its images")
        parts[split] = _Part(f"{root} ({split})", file, folder)
    inside = [p.name for p in subfolders(root)]
    for split in inside:
        file = root / split / "_annotations.coco.json"
        if split not in parts and file.is_file():
            parts[split] = _Part(f"{root} ({split})", file, root / split)
    file, images = root / "annotations.json", root / "images"
    if not parts and file.is_file():
        return _Part(str(root), file, images if images.is_dir() else root), None
    if not parts:
        raise UserError(f"{root}: no annotations of objects (looked for {LOOKED_FOR})")
    bare = [split for split in inside if is_split(split) and split not in parts]
    return pick_splits(parts, bare, root, "annotations")

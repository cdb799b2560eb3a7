"""Write the objects that a detector finds in a folder of images as COCO JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from hpm.core.files import write_text
from hpm.data.detection import to_results
from hpm.data.sources import FileSource
from hpm.weights.detection import DetectionModel

FILE = "results.json"


def write_objects(
    model: DetectionModel,
    source: FileSource,
    images: Iterable[tuple[int, Tensor, tuple[int, int]]],
    file: Path,
) -> None:
    """Write what is found in the images of a source.

    `annotations` is a list of COCO's results (image_id, category_id, score, bbox, segmentation).
    With `images` and `categories` beside it, the file is complete: it can be opened as a data set.

    images: (number in the source, image as it is loaded, (height, width) of its file), the longer
        side resized to the model's image_size.
    """
    rows: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    for index, image, (height, width) in images:
        name = str(Path(source.path(index)).relative_to(source.root))
        described.append({"id": index, "file_name": name, "height": height, "width": width})
        [found] = model.detect([image], [(height, width)])
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        areas = sides.prod(1) if found.masks is None else found.masks.flatten(1).sum(1)
        for row, area in zip(to_results(index, found), areas.tolist(), strict=True):
            rows.append(row | {"id": len(rows) + 1, "area": area, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(model.classes)]
    content = {"images": described, "annotations": rows, "categories": categories}
    write_text(file, json.dumps(content) + "\n")

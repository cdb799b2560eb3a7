"""Small detectors, and small images with boxes and masks."""

import json
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from hpm.models.architecture import Architecture
from hpm.weights.detection import DetectionModel, DetectorShape

TINY = {
    "image_size": 32,
    "steps": 4,
    "batch_size": 4,
    "channels": 16,
    "proposals": 20,
    "box_batch_size": 8,
    "workers": 0,
    "device": "cpu",
}
SHAPE = DetectorShape(
    Architecture(
        image_size=(64, 64), patch_size=(8, 8), channels=3, embed_dim=32, depth=4, num_heads=2
    ),
    classes=["cat", "dog"],
    mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.3, 0.25],
    masks=True,
    window_size=None,
    channels=16,
    anchor_scale=2.0,
    proposals=30,
    score_threshold=0.05,
)


def arguments(**changes):
    options = TINY | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def write_coco(folder, splits=("train", "val"), count=6, masks=True, change=None):
    """Noise with a bright rectangle in each image, of two classes."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        (folder / split).mkdir()
        table = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
        }
        for n in range(count):
            pixels = rng.integers(0, 120, (40, 48, 3)).astype(np.uint8)
            x, y, w, h = rng.integers(2, 20), rng.integers(2, 18), rng.integers(8, 24), 16
            pixels[y : y + h, x : x + w] += 100
            Image.fromarray(pixels).save(folder / split / f"{n}.png")
            x, y, w, h = (int(v) for v in (x, y, w, h))
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            table["images"].append({"id": n, "file_name": f"{n}.png", "height": 40, "width": 48})
            table["annotations"].append(
                {
                    "id": n + 1,
                    "image_id": n,
                    "category_id": 1 + 4 * (n % 2),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": polygon if masks else [],
                }
            )
        if change:
            change(table)
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(table))
    return folder


def tiny_model(**changes):
    torch.manual_seed(0)
    return DetectionModel(replace(SHAPE, **changes)).eval()

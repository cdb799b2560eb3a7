"""What the tests of segmentation share: scenes with masks, small options, fixtures."""

import json

import numpy as np
import torch
from PIL import Image

from hpm.data.demo import render

LINEAR = {
    "head": "linear",
    "image_size": 32,
    "steps": 60,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
}
UPERNET = {
    "head": "upernet",
    "image_size": 32,
    "steps": 6,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "warmup": "1 steps",
    "checkpoint_every": "2 steps",
    "peak_lr": 1e-3,
    "channels": 16,
    "figure_images": 0,
}


def write_scenes(root, train=24, val=6, side=40):
    """Objects of the demo, in two classes: folders of images and masks, as CamVid has them."""
    for split, count in {"train": train, "val": val}.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            drawn = render(number, "train" if split == "train" else "test", side)
            Image.fromarray(drawn.image).save(root / split / "images" / f"{number:02d}.png")
            labels = drawn.mask.astype(np.uint8)
            labels[:2] = 2  # a line without a label
            Image.fromarray(labels).save(root / split / "masks" / f"{number:02d}.png")
    (root / "classes.txt").write_text("background\nobject\nvoid\n")
    return root


def arguments(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def model_in(out, backbone="trained"):
    (file,) = out.glob(f"*/{backbone}/segmenter.safetensors")
    return file


def losses(model_file):
    """Those that were logged while this model was trained."""
    lines = (model_file.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

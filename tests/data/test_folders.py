"""A folder of an annotated data set: its images are taken, and not its masks."""

import io
import json
import os
import tracemalloc

import numpy as np
import pytest
from helpers import run_here, tiny_arguments, write_images
from PIL import Image

from hpm.data.folders import files_below
from hpm.data.sources import open_source


def write(folder, *names, colour=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L" if folder.name != "images" else "RGB", (16, 16), colour).save(folder / name)


def paths(source):
    return sorted(source.path(i) for i in range(len(source)))


@pytest.mark.parametrize("masks", ["masks", "annotations", "labels", "Masks"])
def test_images_beside_masks(tmp_path, masks):
    write(tmp_path / "images", "a.jpg", "b.jpg")
    write(tmp_path / masks, "a.png", "b.png")
    source = open_source(str(tmp_path)).train
    assert paths(source) == [str(tmp_path / "images" / n) for n in ("a.jpg", "b.jpg")]
    assert source.labels is None


def test_splits_of_images_beside_masks(tmp_path):
    for split, names in {"train": ["a", "b", "c"], "val": ["d"], "test": ["e", "f"]}.items():
        write(tmp_path / split / "images", *(f"{n}.jpg" for n in names))
        write(tmp_path / split / "masks", *(f"{n}.png" for n in names))
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 3 and len(splits.test) == 1
    assert splits.train.labels is None and not any("masks" in p for p in paths(splits.train))


def test_ade20k(tmp_path):
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        write(tmp_path / kind / "training", f"a.{suffix}", f"b.{suffix}")
        write(tmp_path / kind / "validation", f"c.{suffix}")
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 2 and len(splits.test) == 1
    assert all("images" in p for p in paths(splits.train))


def test_voc(tmp_path):
    write(tmp_path / "JPEGImages", "a.jpg", "b.jpg")
    for masks in ("SegmentationClass", "SegmentationObject"):
        write(tmp_path / masks, "a.png")
    (tmp_path / "Annotations").mkdir()
    assert len(open_source(str(tmp_path)).train) == 2


def test_coco_as_distributed(tmp_path):
    write(tmp_path / "train2017", "a.jpg", "b.jpg")
    write(tmp_path / "val2017", "c.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps({}))
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 2 and len(splits.test) == 1 and splits.train.labels is None


def test_masks_deeper_down(tmp_path):
    for patient in ("one", "two"):
        write(tmp_path / patient / "images", "a.jpg")
        write(tmp_path / patient / "masks", "a.png")
    source = open_source(str(tmp_path)).train
    assert len(source) == 2 and source.classes == ["one", "two"]


def test_a_class_may_be_called_masks(tmp_path):
    for name in ("hats", "masks"):
        write_images(tmp_path / name, classes=1, per_class=2)
    assert open_source(str(tmp_path)).train.classes == ["hats", "masks"]


def test_real_folders(shared_data):
    for name, counts in {"camvid": (367, 101), "pennfudan": (136, 34)}.items():
        splits = open_source(str(shared_data / name))
        assert (len(splits.train), len(splits.test)) == counts
        assert splits.train.labels is None
        assert not any("/masks/" in p for s in (splits.train, splits.test) for p in paths(s))


def test_pretrain_takes_the_images(tmp_path):
    rng = np.random.default_rng(0)
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        folder = tmp_path / "data" / "train" / kind
        folder.mkdir(parents=True)
        for number in range(16):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels if suffix == "jpg" else pixels[..., 0] % 3).save(
                folder / f"{number}.{suffix}"
            )
    out = tmp_path / "run"
    arguments = tiny_arguments(steps=2, holdout=0)
    result = run_here("pretrain", tmp_path / "data", f"--out={out}", *arguments)
    assert result.returncode == 0, result.stderr
    log = (out / "train.log").read_text()
    assert "16 images of" in log, log  # not 32; and not "16 images/s"


def test_images_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    write(tmp_path, *(f"{number}.jpg" for number in range(30)))
    asked = []

    def noting(call):
        def noted(path, *args, **options):
            asked.append(str(path))
            return call(path, *args, **options)

        return noted

    monkeypatch.setattr(os, "stat", noting(os.stat))
    monkeypatch.setattr(io, "open", noting(io.open))
    assert len(open_source(str(tmp_path)).train) == 30
    assert asked and not [path for path in asked if ".jpg" in path]


def test_links_to_folders(tmp_path):
    write(tmp_path / "elsewhere" / "train", "a.jpg", "b.jpg")
    write(tmp_path / "elsewhere" / "val", "c.jpg")
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(tmp_path / "elsewhere" / split)
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data" / "round")
    splits = open_source(str(tmp_path / "data"))
    assert len(splits.train) == 2 and len(splits.test) == 1


def test_little_memory_is_taken_for_each_image(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3000):
        (tmp_path / "photos" / f"{number:05d}.jpg").touch()
    open_source(str(tmp_path))  # once, for what is cached
    tracemalloc.start()
    try:
        source = open_source(str(tmp_path)).train
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(source) == 3000
    assert peak / 3000 < 170 + len(str(tmp_path)), "bytes"


def test_tables_in_folders_are_found(tmp_path):
    for name in ("b/part-0.parquet", "a.parquet", "b/c/d.parquet", "b/e.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = files_below(tmp_path, ".parquet")
    assert found == sorted(tmp_path.rglob("*.parquet")) and len(found) == 3

"""The fingerprint of a data set is of what it holds, not of where it lies."""

import os
import shutil

import numpy as np
import pytest
from detecting import write_coco
from helpers import write_images
from PIL import Image
from segmentation import write_scenes

from hpm.data import fingerprint as module
from hpm.data.detection import open_detection
from hpm.data.fingerprint import annotated, differing, fingerprint
from hpm.data.segmentation import open_segmentation
from hpm.data.sources import Subset, hold_out, open_source


def of(path):
    return fingerprint(open_source(str(path)).train)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", classes=2, per_class=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_another_place_or_another_way_to_write_it(photos, tmp_path, monkeypatch):
    expected = of(photos)
    assert set(expected) == {"names", "sizes"}
    for path in ("photos", "photos/", "./photos", "../" + tmp_path.name + "/photos"):
        assert of(path) == expected, path
    moved = shutil.copytree(photos, tmp_path / "elsewhere" / "pictures")
    assert of(moved) == expected
    monkeypatch.chdir(moved)
    assert of(".") == expected
    source = open_source(".").train
    assert fingerprint(hold_out(source, 2, 0)[0]) == expected
    assert fingerprint(Subset(source, np.array([0]))) == expected


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda image: image.unlink(), ["names", "sizes"]),
        (lambda image: image.rename(image.with_name("999.png")), ["names"]),
        (lambda image: image.write_bytes(image.read_bytes() + b"0"), ["sizes"]),
        (lambda image: image.unlink() or image.symlink_to("/nowhere"), ["sizes"]),
        (lambda image: os.utime(image, (0, 0)), []),
        (lambda image: image.with_name("notes.txt").write_text("x"), []),
    ],
)
def test_what_changes_it(photos, change, changed):
    before = of(photos)
    change(photos / "class_1" / "003.png")
    assert differing(before, of(photos)) == changed


def test_a_list_file(photos, tmp_path):
    names = [f"photos/class_0/{i:03d}.png" for i in range(4)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    expected = of("list.txt")
    other = tmp_path / "other"
    shutil.copytree(photos, other / "photos")
    shutil.copy(tmp_path / "list.txt", other / "renamed.txt")
    assert of(other / "renamed.txt") == expected
    (tmp_path / "list.txt").write_text("\n".join(f"{name} 1" for name in names))
    assert of("list.txt") == expected  # labels are not used
    (tmp_path / "list.txt").write_text("\n".join(reversed(names)))
    assert "names" in differing(expected, of("list.txt"))


def test_parquet(photos, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def write(file, count):
        rows = [{"bytes": path.read_bytes()} for path in sorted(photos.rglob("*.png"))[:count]]
        parquet.write_table(pyarrow.table({"image": rows}), file)
        return of(file)

    expected = write(tmp_path / "a.parquet", 6)
    assert set(expected) == {"rows", "sizes"}
    assert write(tmp_path / "b.parquet", 6) == expected
    assert differing(expected, write(tmp_path / "a.parquet", 5)) == ["rows", "sizes"]
    assert differing(expected, of(photos)) == ["names", "rows", "sizes"]


def test_the_sizes_of_many_files_are_looked_up_of_some(photos, monkeypatch):
    looked_up = []
    size = module._size
    monkeypatch.setattr(module, "_size", lambda file: looked_up.append(file) or size(file))
    monkeypatch.setattr(module, "MAX_SIZES", 3)
    expected = of(photos)
    assert len(looked_up) == 3 and looked_up[0].endswith("class_0/000.png")
    assert of(photos) == expected


def test_the_demo():
    splits = open_source("demo")
    assert fingerprint(splits.train) == fingerprint(splits.train) != fingerprint(splits.test)


def test_labels_that_were_corrected(photos):
    rows = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    found = []
    for first, others in ("ab", "ab", "ba"):
        labels = [first] + [others] * (len(rows) - 1)
        lines = [f"{row},{label}" for row, label in zip(rows, labels, strict=True)]
        (photos / "list.csv").write_text("\n".join(["path,label", *lines]))
        found.append(annotated(open_source(str(photos / "list.csv")).train))
    assert found[0] == found[1] and differing(found[0], found[2]) == ["labels"]


def test_other_images_of_the_same_source(photos):
    source = open_source(str(photos)).train
    parts = [hold_out(source, 2, seed)[0] for seed in (0, 0, 1)]
    assert annotated(parts[0]) == annotated(parts[1])
    assert "images" in differing(annotated(parts[0]), annotated(parts[2]))
    assert "images" in differing(annotated(parts[0]), annotated(source))


def test_masks_of_the_same_size_that_were_corrected(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", train=4, val=2)
    before = annotated(open_segmentation(str(scenes)).train)
    moved = shutil.copytree(scenes, tmp_path / "elsewhere")
    assert annotated(open_segmentation(str(moved)).train) == before
    file = scenes / "train" / "masks" / "00.png"
    Image.fromarray(np.asarray(Image.open(file))[:, ::-1].copy()).save(file)
    assert differing(before, annotated(open_segmentation(str(scenes)).train)) == ["annotations"]


def test_objects_that_were_corrected(tmp_path):
    def moved(table):
        table["annotations"][0]["bbox"][0] += 1

    before, same, after = (
        annotated(open_detection(str(write_coco(tmp_path / name, change=change))).train)
        for name, change in (("a", None), ("b", None), ("c", moved))
    )
    assert before == same and differing(before, after) == ["annotations"]

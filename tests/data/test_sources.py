import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from helpers import write_images
from PIL import Image

from hpm.core.errors import UserError
from hpm.core.plugins import installed_plugins
from hpm.data.loader import evaluation_batches
from hpm.data.paths import Paths
from hpm.data.sources import ENTRY_POINTS, Subset, hold_out, object_mask, open_source
from hpm.data.split_names import train_and_test
from hpm.data.streams.rows import local_rows


def test_class_folders(image_folder):
    splits = open_source(str(image_folder))
    assert len(splits.train) == 48 and splits.test is None
    assert splits.train.classes == ["class_0", "class_1", "class_2"]
    for index in (0, 20, 47):
        assert f"class_{splits.train.labels[index]}" in splits.train.path(index)
        assert splits.train.open(index).size == (20, 20)


def test_flat_and_nested_folders_without_classes(tmp_path):
    write_images(tmp_path / "deep" / "er", classes=1, per_class=2)
    assert open_source(str(tmp_path)).train.classes == ["deep"]
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = open_source(str(tmp_path)).train
    assert len(source) == 3 and source.labels is None


def test_splits_of_a_folder(tmp_path):
    write_images(tmp_path / "train", per_class=2)
    write_images(tmp_path / "val", per_class=1)
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 6 and len(splits.test) == 3


def test_a_class_that_is_called_train(tmp_path):
    for vehicle in ("bus", "train"):
        write_images(tmp_path / vehicle, classes=1, per_class=2)
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 4 and splits.train.classes == ["bus", "train"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / "images", classes=1, per_class=2)
    (tmp_path / "images" / "circle").symlink_to(tmp_path / "images")
    assert len(open_source(str(tmp_path / "images")).train) == 2


def test_list_file(image_folder, tmp_path):
    spaced = image_folder / "class_0" / "with space.png"
    Image.new("RGB", (8, 8)).save(spaced)
    lines = ["class_1/000.png 10", "class_0/with space.png 9", "", "class_2/003.png 10"]
    (image_folder / "list.txt").write_text("\n".join(lines))
    source = open_source(str(image_folder / "list.txt")).train
    assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0, 1]
    assert source.path(1).endswith("with space.png")
    spaced.unlink()


def test_list_file_without_labels(image_folder):
    (image_folder / "list.txt").write_text("class_1/000.png\nclass_0/001.png\n")
    assert open_source(str(image_folder / "list.txt")).train.labels is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "class_1/000.png cat\nclass_0/001.png\nclass_0/000.png\n"),
        ("table.csv", "file,label\nclass_1/000.png,cat\nclass_0/001.png,\nclass_0/000.png, \n"),
    ],
)
def test_a_list_with_labels_of_some_images_has_none(image_folder, capsys, name, text):
    path = image_folder / name
    path.write_text(text)
    source = open_source(str(path)).train
    assert len(source) == 3 and source.labels is None and not source.classes
    assert f"{path}: 2 of 3 images have no label, so the" in capsys.readouterr().err


def test_parquet_with_labels_of_some_images_has_none(tmp_path, capsys):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 3, "label": [1, None, 2]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "some.parquet")
    assert open_source(str(tmp_path / "some.parquet")).train.labels is None
    assert "1 of 3 images have no label" in capsys.readouterr().err


def test_list_file_with_a_missing_image(image_folder):
    (image_folder / "list.txt").write_text("class_1/000.png 1\nclass_9/000.png 1\n")
    with pytest.raises(UserError, match=r"line 2: no such image: class_9/000.png 1"):
        open_source(str(image_folder / "list.txt"))


def encoded(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "png")
    return file.getvalue()


def write_parquet(path, labels, names=None):
    images = [{"bytes": encoded((10 * n, 0, 0)), "path": f"{n}.png"} for n in range(len(labels))]
    table = pyarrow.table({"image": images, "label": labels})
    if names:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=2)


def test_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 2])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [2, 1])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [1])
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 5 and len(splits.test) == 1
    assert splits.train.labels.tolist() == [0, 1, 2, 2, 1]
    colours = [splits.train.open(i).getpixel((0, 0))[0] for i in range(5)]
    assert colours == [0, 10, 20, 0, 10]


@pytest.mark.parametrize("train", ["train", "default/train", "partial-train", "Train2017"])
def test_parquet_in_folders_named_as_splits(train, tmp_path):
    """The layout of the hub's conversion to parquet: only the folders name the splits."""
    for folder, images in ((train, 3), (train.replace("rain", "est"), 1)):
        (tmp_path / folder).mkdir(parents=True)
        write_parquet(tmp_path / folder / "0000.parquet", [0] * images)
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 3 and len(splits.test) == 1
    stream = local_rows(tmp_path)
    assert sum(len(list(stream.read(shard))) for shard in range(len(stream.shards))) == 3
    assert len(open_source(str(tmp_path / train)).train) == 3


def test_parquet_in_folders_that_are_no_splits(tmp_path):
    for folder in ("trains", "valleys"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "0000.parquet", [0, 1])
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 4 and splits.test is None


def test_files_of_a_split_may_begin_like_the_name_of_another(tmp_path):
    for name, images in (("train/valencia", 2), ("train/testimony", 3), ("test/trained", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", [0] * images)
    splits = open_source(str(tmp_path))
    assert len(splits.train) == 5 and len(splits.test) == 1


def test_the_shortest_name_of_a_split():
    names = ["train_extra", "train", "test_unlabelled", "test"]
    assert train_and_test(names) == ("train", "test")


@pytest.mark.parametrize(("others", "test"), [([], None), (["test"], "test")])
def test_validation_within_the_training_split_is_not_tested_on(others, test):
    assert train_and_test(["trainval", "val", *others]) == ("trainval", test)


def test_parquet_with_class_names(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 0], names=["cat", "dog"])
    source = open_source(str(tmp_path / "a.parquet")).train
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 0]


def test_parquet_whose_test_labels_are_withheld(tmp_path):
    """Validation is what is tested on, not the test split without labels."""
    names = ["cat", "dog"]
    write_parquet(tmp_path / "train-0.parquet", [0, 1], names)
    write_parquet(tmp_path / "validation-0.parquet", [1, 0, 1], names)
    write_parquet(tmp_path / "test-0.parquet", [-1] * 5, names)
    assert open_source(str(tmp_path)).test.labels.tolist() == [1, 0, 1]
    assert open_source(str(tmp_path / "test-0.parquet")).train.labels is None


def test_cifar10(shared_data):
    splits = open_source(str(shared_data / "cifar10"))
    assert len(splits.train) == 50000 and len(splits.test) == 10000
    assert len(splits.train.classes) == 10
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10
    assert splits.train.open(49999).size == (32, 32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "no such folder or file"),
        (lambda p: p, "no images in this folder"),
        (lambda p: _write(p / "list.txt", b""), "the list is empty"),
        (lambda p: _write(p / "list.txt", b"\xff\xfe\x00"), "text list"),
        (lambda p: _write(p / "a.parquet", b"PAR1"), "not readable parquet"),
    ],
)
def test_bad_sources(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        open_source(str(make(tmp_path)))


def _write(path, content):
    path.write_bytes(content)
    return path


def test_hold_out_parts_a_source(image_folder):
    source = open_source(str(image_folder)).train
    rest, held = hold_out(source, 10, seed=1)
    paths = [s.path(i) for s in (rest, held) for i in range(len(s))]
    assert len(rest) == 38 and len(held) == 10 and len(set(paths)) == 48
    for part in (rest, held):
        for index in range(len(part)):
            assert f"class_{part.labels[index]}" in part.path(index)


def test_objects_are_known_of_demo_alone(image_folder):
    demo = Subset(open_source("demo").train, np.array([5, 3]))
    assert object_mask(demo, 1).shape == (64, 64)
    assert object_mask(open_source(str(image_folder)).train, 0) is None


def test_paths_are_held_compactly():
    names = ["a/b.png", "Ä/ö ü.jpg", os.fsdecode(b"not\xff utf-8"), "a/b.png"]
    paths = Paths(map(Path, names))
    assert list(paths) == names and len(paths) == 4
    assert paths[-1] == "a/b.png" and list(paths[1:3]) == names[1:3]
    with pytest.raises(IndexError):
        paths[4]
    assert len(pickle.dumps(Paths(["x" * 50] * 1000))) < 62 * 1000
    assert list(Paths([])) == []


OWN = """
import numpy as np
from PIL import Image

from hpm.data.sources import Splits


class Squares:
    name, labels, classes = "squares", None, []

    def __init__(self, count=8):
        self.count = count

    def __len__(self):
        return self.count

    def open(self, index):
        return Image.new("RGB", (20, 20), (10 * index, 0, 0))

    def read(self, index):
        return None

    def is_deep(self):
        return False

    def path(self, index):
        return f"square {index}"


def splits():
    return Splits(Squares(), Squares(3))


def empty():
    return Squares(0)


def fails():
    raise KeyError("gone")


def incomplete():
    return [1, 2]


number = 3
"""


@pytest.fixture
def own_sources(tmp_path, monkeypatch):
    """A module of the user's own on the Python path."""
    (tmp_path / "own_sources.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_sources"
    sys.modules.pop("own_sources", None)


def test_a_source_of_ones_own(own_sources):
    assert len(open_source(f"{own_sources}:Squares").train) == 8
    splits = open_source(f"{own_sources}:splits")
    assert (len(splits.train), len(splits.test)) == (8, 3)
    (batch,) = evaluation_batches(splits.test, (16, 16), 3, 4)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("empty", "has no images"),
        ("fails", "failed: KeyError: 'gone'"),
        ("incomplete", "list lacks name, labels, classes, open"),
        ("number", "not a function"),
        ("square", "own_sources has no 'square'"),
    ],
)
def test_a_source_of_ones_own_that_cannot_be_used(own_sources, function, words):
    with pytest.raises(UserError, match=words):
        open_source(f"{own_sources}:{function}")


def test_a_name_from_a_file_is_not_imported(own_sources):
    with pytest.raises(UserError, match="no such folder or file"):
        open_source(f"{own_sources}:Squares", trusted=False)
    assert own_sources not in sys.modules


def test_a_source_of_an_installed_package(own_sources, tmp_path, monkeypatch):
    about = tmp_path / "squares-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: squares\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nsquares = own_sources:Squares\n")
    installed_plugins.cache_clear()
    assert len(open_source("squares").train) == 8
    installed_plugins.cache_clear()

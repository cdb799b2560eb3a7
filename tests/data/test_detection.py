import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_masks
from PIL import Image

from hpm.core.errors import UserError
from hpm.data import coco
from hpm.data.demo import render
from hpm.data.detection import ground_truth, has_masks, objects, open_detection
from hpm.data.rle import decode_masks, encode_masks
from hpm.data.sources import Subset

HEIGHT, WIDTH = 20, 30


def a_mask(top, left, bottom, right):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def counts_of(mask):
    """Lengths of the runs, column by column, zeros first."""
    flat = mask.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def content():
    """One image with a polygon and a crowd, one with a compressed code, one with nothing."""
    crowd, code = a_mask(0, 0, 4, 6), a_mask(5, 10, 15, 20)
    size = [HEIGHT, WIDTH]
    return {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in (7, 3, 9)
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 40,
                "bbox": [2, 3, 8, 5],
                "area": 40,
                "iscrowd": 0,
                "segmentation": [[2, 3, 10, 3, 10, 8, 2, 8]],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 12,
                "bbox": [0, 0, 6, 4],
                "area": 24,
                "iscrowd": 1,
                "segmentation": {"size": size, "counts": counts_of(crowd)},
            },
            {
                "id": 5,
                "image_id": 3,
                "category_id": 12,
                "bbox": [10, 5, 10, 10],
                "area": 100,
                "segmentation": encode_masks(code[None])[0],
            },
        ],
        "categories": [{"id": 40, "name": "cat"}, {"id": 12, "name": "dog"}],
    }


def write(root, train=None, val=None, images="{split}", file="annotations/instances_{split}.json"):
    for split, table in {"train": train or content(), "val": val or content()}.items():
        folder, table_file = root / images.format(split=split), root / file.format(split=split)
        folder.mkdir(parents=True, exist_ok=True)
        table_file.parent.mkdir(parents=True, exist_ok=True)
        for number in (7, 3, 9):
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{number}.jpg")
        table_file.write_text(table if isinstance(table, str) else json.dumps(table))
    return root


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        open_detection(str(folder))
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


LAYOUTS = [
    {},
    {"images": "{split}/images"},
    {"images": "images/{split}"},
    {"images": "{split}2017", "file": "annotations/instances_{split}2017.json"},
    {"images": "{split}", "file": "{split}/_annotations.coco.json"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    splits = open_detection(str(write(tmp_path, **layout)))
    assert splits.train.classes == ["dog", "cat"] and splits.train.labels is None
    assert len(splits.train) == len(splits.test) == 3
    assert splits.train.open(0) is not None


def test_one_file_beside_images(tmp_path):
    write(tmp_path, images="images", file="annotations.json")
    splits = open_detection(str(tmp_path))
    assert len(splits.train) == 3 and splits.test is None


def test_polygons_codes_and_crowds(tmp_path):
    train = open_detection(str(write(tmp_path))).train
    assert has_masks(train)
    first, second, none = (objects(train, index) for index in range(3))
    assert first.boxes.tolist() == [[2, 3, 10, 8], [0, 0, 6, 4]]
    assert first.classes.tolist() == [1, 0] and first.crowd.tolist() == [False, True]
    assert np.array_equal(first.masks[0], a_mask(3, 2, 8, 10))
    assert np.array_equal(first.masks[1], a_mask(0, 0, 4, 6))
    assert np.array_equal(second.masks[0], a_mask(5, 10, 15, 20))
    assert none.boxes.shape == (0, 4) and none.masks.shape == (0, HEIGHT, WIDTH)
    part = Subset(train, np.array([1]))
    assert torch.equal(objects(part, 0).boxes, second.boxes) and has_masks(part)


def test_codes_agree_with_the_library():
    rng = np.random.default_rng(0)
    masks = rng.random((5, HEIGHT, WIDTH)) < 0.4
    plain = [{"size": [HEIGHT, WIDTH], "counts": counts_of(mask)} for mask in masks]
    assert np.array_equal(decode_masks(plain, HEIGHT, WIDTH), masks)
    assert np.array_equal(decode_masks(encode_masks(masks), HEIGHT, WIDTH), masks)
    assert coco_masks.area(encode_masks(masks)[2]) == masks[2].sum()
    assert encode_masks(masks[:0]) == [] and decode_masks([], 4, 5).shape == (0, 4, 5)


def test_boxes_alone(tmp_path):
    table = content()
    for annotation in table["annotations"]:
        annotation["segmentation"] = []
    train = open_detection(str(write(tmp_path, table, table))).train
    assert not has_masks(train) and objects(train, 0).masks is None
    table["annotations"][0].pop("segmentation")
    table["annotations"][1] = content()["annotations"][1]
    assert not has_masks(open_detection(str(write(tmp_path, table, table))).train)


def test_ground_truth_numbers_images_and_classes(tmp_path):
    train = open_detection(str(write(tmp_path))).train
    table = ground_truth(Subset(train, np.array([1, 0])))
    assert [i["id"] for i in table["images"]] == [0, 1]
    rows = [(a["image_id"], a["category_id"], a["iscrowd"]) for a in table["annotations"]]
    assert rows == [(0, 0, 0), (1, 1, 0), (1, 0, 1)]
    assert table["categories"] == [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]
    assert len({a["id"] for a in table["annotations"]}) == 3
    assert len(ground_truth(train, [2])["annotations"]) == 0


def test_demo():
    test = open_detection("demo").test
    for index in range(20):
        drawn, found = render(index, "test"), objects(test, index)
        assert np.array_equal(found.boxes.numpy(), drawn.boxes)
        assert np.array_equal(found.masks.any(0).numpy(), drawn.mask)
        assert set(found.classes.tolist()) == {index % 10}
    assert len(ground_truth(test, range(5))["images"]) == 5


def broken(change):
    table = content()
    change(table)
    return table


BOX = [
    ([-9, 3, 8, 5], "outside"),
    ([2, 3, 40, 18], "outside"),
    ([40, 3, 8, 5], "outside"),
    ([2, 3, 0, 5], "empty"),
    ([2, 3, -8, 5], "negative"),
    ([2, 3, 8], "not x, y, width, height"),
    ([2, 3, 8, float("nan")], "not x, y, width, height"),
    (None, "not x, y, width, height"),
]


@pytest.mark.parametrize(("box", "word"), BOX)
def test_faulty_boxes(tmp_path, box, word):
    table = broken(lambda t: t["annotations"][0].update(bbox=box))
    refused(write(tmp_path, table), "instances_train.json: annotation 1 of 7.jpg", word)


def test_a_rare_faulty_box_is_passed_over(tmp_path, capsys):
    """COCO itself has two empty boxes."""
    table = content()
    rows = [copy.copy(table["annotations"][2]) | {"id": 100 + n} for n in range(1000)]
    table["annotations"] += [rows[0] | {"id": 99, "bbox": [3, 3, 0, 2]}, *rows]
    train = open_detection(str(write(tmp_path, table))).train
    assert len(objects(train, 1)) == 1001
    assert "passed over 1 faulty box" in capsys.readouterr().err


CODE = {"size": [HEIGHT, WIDTH]}
MISTAKES = [
    (lambda t: t["annotations"][0].update(category_id=5), ["annotation 1", "category 5", "12, 40"]),
    (lambda t: t["annotations"][0].update(image_id=5), ["annotation 1 is of image 5"]),
    (lambda t: t["images"][0].update(file_name="gone.jpg"), ["names gone.jpg", "train lacks"]),
    (lambda t: t["images"][0].pop("height"), ["image 7 has no height"]),
    (lambda t: t["images"][0].pop("file_name"), ["image 7 has no file_name"]),
    (lambda t: t["images"][0].update(id=3), ["the id 3"]),
    (lambda t: t["images"][0].pop("id"), ["not a whole number"]),
    (lambda t: t["images"].clear(), ["names no images"]),
    (lambda t: t["categories"].clear(), ["no categories"]),
    (lambda t: t.pop("annotations"), ["no list 'annotations'"]),
    (lambda t: t["annotations"].append(3), ["'annotations' has"]),
    (lambda t: t["annotations"][0].update(segmentation=[[1, 2, 3]]), ["neither a run-length"]),
    (lambda t: t["annotations"][0].update(segmentation="x"), ["neither a run-length"]),
    (lambda t: t["annotations"][1]["segmentation"].update(size=[9, 9]), ["is of size [9, 9]"]),
    (lambda t: t["annotations"][1]["segmentation"].update(counts=[5]), ["do not add up"]),
    (lambda t: t["annotations"][1]["segmentation"].update(counts="zzz"), ["code is broken"]),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES)
def test_mistakes_in_the_json(tmp_path, change, words):
    refused(write(tmp_path, broken(change)), "instances_train.json", *words)


def test_broken_json(tmp_path):
    refused(write(tmp_path, '{"images": [1,\n'), "instances_train.json, line 2", "not valid JSON")


def test_a_split_without_annotations(tmp_path):
    write(tmp_path)
    (tmp_path / "annotations/instances_val.json").unlink()
    refused(tmp_path, "split val has images but no annotations")
    (tmp_path / "annotations/instances_train.json").rename(
        tmp_path / "annotations/instances_val.json"
    )
    refused(tmp_path, "split train has images but no annotations")


def test_splits_of_other_categories(tmp_path):
    other = broken(lambda t: t["categories"][0].update(name="cow"))
    refused(write(tmp_path, val=other), "instances_val.json", "categories")


def test_no_layout_fits(tmp_path):
    refused(tmp_path, "no annotations of objects", "instances_SPLIT.json", "_annotations.coco.json")
    refused(tmp_path / "nowhere", "no such folder")


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    table = broken(lambda t: t["annotations"].pop())
    write(tmp_path, table, table)
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.mask", None)
    with pytest.raises(UserError, match=r"pip install 'hpm-vision\[dense\]'"):
        open_detection(str(tmp_path))


def test_real_folders(shared_data):
    for name, counts, classes in (("pennfudan", (136, 34), 1), ("coco_mini", (361, 121), 80)):
        splits = open_detection(str(shared_data / name))
        assert (len(splits.train), len(splits.test)) == counts
        assert len(splits.train.classes) == classes and has_masks(splits.train)
        found = objects(splits.test, 0)
        assert len(found) and found.masks.flatten(1).any(1).all()


def test_of_many_images_only_some_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "MOST_CHECKED", 10)
    images = [
        {"id": number, "file_name": f"{number}.jpg", "height": 8, "width": 8}
        for number in range(100)
    ]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    asked = []
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or True)
    assert len(coco.read_coco(tmp_path / "a.json", tmp_path).files) == 100
    assert len(asked) == 10

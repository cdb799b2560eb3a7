import json

import numpy as np
import pytest
from PIL import Image

from hpm.core.errors import UserError
from hpm.data.arrays import UnreadableImage
from hpm.data.demo import render
from hpm.data.segmentation import label_map, open_segmentation
from hpm.data.sources import hold_out

SIDES = (12, 16)  # height, width


def write_pair(images, masks, name, labels, size=SIDES):
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 120, 30)).save(images / f"{name}.jpg")
    Image.fromarray(np.resize(np.asarray(labels, np.uint8), SIDES)).save(masks / f"{name}.png")


def camvid(root, train=((0, 1, 2), (1, 2, 3)), val=((0, 3),)):
    for split, masks in {"train": train, "val": val}.items():
        for number, labels in enumerate(masks):
            write_pair(root / split / "images", root / split / "masks", f"{number}", labels)
    return root


def labels_in(source, index=0):
    return np.unique(label_map(source, index)).tolist()


def refused(folder, *words, **options):
    with pytest.raises(UserError) as caught:
        splits = open_segmentation(str(folder), **options)
        for source in (splits.train, splits.test):
            for index in range(len(source or ())):
                label_map(source, index)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_splits_of_images_and_masks(tmp_path):
    splits = open_segmentation(str(camvid(tmp_path)))
    assert splits.train.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert len(splits.train) == 2 and len(splits.test) == 1
    assert label_map(splits.train, 1).shape == SIDES
    assert labels_in(splits.train, 1) == [1, 2, 3] and labels_in(splits.test) == [0, 3]
    assert splits.train.path(1).endswith("1.jpg")


def test_an_ignored_label_closes_the_gap(tmp_path):
    splits = open_segmentation(str(camvid(tmp_path)), ignored=1)
    assert splits.train.classes == ["class 0", "class 2", "class 3"]
    assert labels_in(splits.train, 1) == [1, 2, 255]


def test_names_from_a_text_file(tmp_path):
    camvid(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\nvoid\n")
    splits = open_segmentation(str(tmp_path))
    assert splits.train.classes == ["sky", "road", "car"]
    assert labels_in(splits.test) == [0, 255]


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    camvid(tmp_path)
    (tmp_path / "classes.txt").write_text("void\nroad\ncar\nsky\n", encoding="utf-8-sig")
    splits = open_segmentation(str(tmp_path))
    assert splits.train.classes == ["road", "car", "sky"] and 255 in labels_in(splits.train)


def test_other_meanings_of_the_same_masks_are_other_annotations(tmp_path):
    """Else a model would be tested on labels that it was not trained on."""
    camvid(tmp_path)
    found = []
    for names in ("void\nroad\ncar\nsky\n", "road\nvoid\ncar\nsky\n"):
        (tmp_path / "classes.txt").write_text(names)
        train = open_segmentation(str(tmp_path)).train
        found.append((train.classes, train.annotations_digest()))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize(
    "content", [["sky", "road", "car", "bus"], {"0": "sky", "1": "road", "2": "car", "3": "bus"}]
)
def test_names_from_json(tmp_path, content):
    camvid(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert open_segmentation(str(tmp_path)).train.classes == ["sky", "road", "car", "bus"]
    (tmp_path / "classes.json").write_text("7")
    refused(tmp_path, "classes.json")


def test_no_splits_and_255(tmp_path):
    for name in "abcd":
        write_pair(tmp_path / "images", tmp_path / "masks", name, [0, 1, 255])
    splits = open_segmentation(str(tmp_path))
    assert splits.test is None and labels_in(splits.train) == [0, 1, 255]
    rest, held = hold_out(splits.train, 1, seed=0)
    assert len(rest) == 3 and labels_in(held) == [0, 1, 255]


def test_ade20k(tmp_path):
    for split, names in {"training": "ab", "validation": "c"}.items():
        for name in names:
            folders = (tmp_path / kind / split for kind in ("images", "annotations"))
            write_pair(*folders, f"ADE_{name}", [0, 1, 150])
    splits = open_segmentation(str(tmp_path))
    assert len(splits.train.classes) == 150 and len(splits.test) == 1
    assert labels_in(splits.train) == [0, 149, 255]
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t1\t2\twall\n2\t0.1\t1\t2\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    refused(tmp_path, "label 150 is none of the 2 classes' (1 to 2)")


def voc(root):
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    palette = np.arange(768) % 256
    for name, split in {"a": "train", "b": "train", "c": "val"}.items():
        write_pair(root / "JPEGImages", root / "SegmentationClass", name, [0])
        mask = Image.fromarray(np.resize(np.uint8([0, 1, 2, 255]), SIDES)).convert("P")
        mask.putdata(np.resize(np.uint8([0, 1, 2, 255]), SIDES).ravel())
        mask.putpalette(palette.tolist())
        mask.save(root / "SegmentationClass" / f"{name}.png")
        with open(lists / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")
    return root


def test_voc(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "unused.jpg")
    splits = open_segmentation(str(voc(tmp_path)))
    assert len(splits.train) == 2 and len(splits.test) == 1
    assert splits.train.classes == ["class 0", "class 1", "class 2"]
    assert labels_in(splits.train) == [0, 1, 2, 255]


def test_voc_of_a_missing_image(tmp_path):
    voc(tmp_path)
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    refused(tmp_path, "train.txt names b", "JPEGImages/b.jpg")


def test_numbered_objects_are_one_class(tmp_path):
    camvid(tmp_path, train=[(0, 1, 2, 9)], val=[(0, 30)])
    one = open_segmentation(str(tmp_path), one_class=True)
    assert one.train.classes == ["background", "object"] and labels_in(one.test) == [0, 1]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train.json"
    file.write_text(json.dumps({"categories": [{"id": 1, "name": "person"}]}))
    found = open_segmentation(str(tmp_path))
    assert found.train.classes == ["background", "person"] and labels_in(found.train) == [0, 1]


def test_demo():
    splits = open_segmentation("demo")
    drawn = render(7, "test")
    found = label_map(splits.test, 7)
    assert splits.test.classes[0] == "background" and len(splits.test.classes) == 11
    assert np.array_equal(found > 0, drawn.mask) and set(found[drawn.mask]) == {drawn.label + 1}
    assert np.array_equal(np.asarray(splits.test.open(7)), drawn.image)


def test_no_layout_fits(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    refused(tmp_path, "no images with masks", "SPLIT/masks", "ADE20K", "SegmentationClass")
    refused(tmp_path / "nowhere", "no such folder")


def test_a_mask_of_another_size(tmp_path):
    camvid(tmp_path)
    write_pair(tmp_path / "val/images", tmp_path / "val/masks", "0", [0], size=(12, 15))
    refused(tmp_path, "val/images/0.jpg", "16x12", "15x12")


def test_labels_out_of_range(tmp_path):
    camvid(tmp_path, val=[(0, 7)])
    refused(tmp_path, "val/masks/0.png", "label 7 is none of the 4 classes' (0 to 3)")


def test_one_class_alone(tmp_path):
    refused(camvid(tmp_path, train=[(0, 255)]), "1 class", "two or more")


def test_an_image_without_a_mask_and_the_reverse(tmp_path):
    camvid(tmp_path)
    (tmp_path / "train/masks/1.png").rename(tmp_path / "1.png")
    refused(tmp_path, "no mask for", "train/images/1.jpg")
    (tmp_path / "1.png").rename(tmp_path / "train/masks/1.png")
    (tmp_path / "train/images/0.jpg").unlink()
    refused(tmp_path, "no image for", "train/masks/0.png")


def test_a_split_without_masks(tmp_path):
    camvid(tmp_path)
    for file in (tmp_path / "val/masks").iterdir():
        file.unlink()
    (tmp_path / "val/masks").rmdir()
    refused(tmp_path, "split val has images but no masks")
    (tmp_path / "train/masks").rename(tmp_path / "val/masks")
    refused(tmp_path, "split train has images but no masks")


def test_masks_of_colours_and_of_jpeg(tmp_path):
    camvid(tmp_path)
    Image.new("RGB", SIDES[::-1]).save(tmp_path / "train/masks/0.png")
    refused(tmp_path, "train/masks/0.png", "one number per pixel")
    (tmp_path / "train/masks/0.png").unlink()
    Image.new("L", SIDES[::-1]).save(tmp_path / "train/masks/0.jpg")
    refused(tmp_path, "0.jpg", "JPEG alters labels")


def test_a_broken_mask_is_counted_while_loading(tmp_path):
    splits = open_segmentation(str(camvid(tmp_path)))
    (tmp_path / "train/masks/0.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UnreadableImage, match=r"masks/0\.png"):
        label_map(splits.train, 0)


def test_real_folders(shared_data):
    splits = open_segmentation(str(shared_data / "camvid"), ignored=11)
    assert len(splits.train.classes) == 11 and len(splits.test) == 101
    assert label_map(splits.test, 0).shape == (360, 480)
    splits = open_segmentation(str(shared_data / "pennfudan"))
    assert splits.train.classes == ["background", "person"]
    assert labels_in(splits.train) == [0, 1]

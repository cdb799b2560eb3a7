"""What is wrong with data or options is one clear line, exit code 2, before anything is trained."""

import pytest
from detecting import arguments, write_coco
from helpers import assert_refused, run_here


def faulty(**changes):
    return lambda table: table["annotations"][0].update(changes)


def drop_annotations(table):
    table["annotations"] = []


MISTAKES = [
    (faulty(bbox=[40, 3, 20, 5]), "outside"),
    (faulty(bbox=[2, 3, 0, 5]), "empty"),
    (faulty(bbox=[2, 3, -8, 5]), "negative"),
    (faulty(category_id=3), "category 3"),
    (lambda table: table["images"][0].update(file_name="gone.png"), "lacks"),
    (lambda table: table["images"][0].update(width=47), "48x40 pixels, but its annotations"),
    (lambda table: table.pop("annotations"), "no list 'annotations'"),
    (drop_annotations, "annotated object"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_bad_annotations(finished_run, tmp_path, change, words):
    data = write_coco(tmp_path / "data", change=change)
    out = tmp_path / "out"
    result = run_here(
        "eval", "detect", finished_run.folder, data, "--out", out, *arguments(steps=1)
    )
    assert_refused(result, words)
    assert not list(out.rglob("detector.safetensors"))


def test_a_split_without_annotations(finished_run, tmp_path):
    data = write_coco(tmp_path / "data")
    (data / "annotations/instances_val.json").unlink()
    result = run_here("eval", "detect", finished_run.folder, data, "--out", tmp_path / "out")
    assert_refused(result, "val", "annotations")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 40}, "the nearest that fits is 32"),
        ({"crop_share": 0.9}, "crop-share"),
        ({"milestones": "half"}, "milestones: 'half' is not a duration"),
        ({"accumulate": 9}, "9 or more can"),
    ],
)
def test_options_that_cannot_work(finished_run, tmp_path, options, words):
    data = write_coco(tmp_path / "data")
    result = run_here(
        "eval",
        "detect",
        finished_run.folder,
        data,
        "--out",
        tmp_path / "out",
        *arguments(**options),
    )
    assert_refused(result, words)


def test_other_categories_in_the_test_images(finished_run, tmp_path):
    data = write_coco(tmp_path / "data")
    other = write_coco(
        tmp_path / "other", change=lambda table: table["categories"][0].update(name="horse")
    )
    result = run_here(
        "eval", "detect", finished_run.folder, data, "--test", other, "--out", tmp_path / "out"
    )
    assert_refused(result, "horse", "cat")

"""Against hand-made cases whose average precision is known.

COCO's AP averages precision at 101 recalls (0, 0.01, ..., 1) and at the IoUs 0.50, 0.55, ..., 0.95.
"""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm.core.errors import UserError
from hpm.data.detection import Detections, ground_truth, objects, open_detection, to_results
from hpm.evals.detection_metrics import RESAMPLES, WITH_INTERVAL, evaluate_detections


def truth(*boxes, category=0, crowd=()):
    """Boxes x, y, width, height, one image."""
    return {
        "images": [{"id": 0, "height": 200, "width": 200}],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 0,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(n in crowd),
                "segmentation": [],
            }
            for n, box in enumerate(boxes)
        ],
        "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
    }


def results(*boxes, scores=None, category=0):
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).float()
    scores = torch.tensor(scores or [0.9 - 0.1 * n for n in range(len(boxes))])
    return to_results(0, Detections(corners, scores, torch.full((len(boxes),), category)))


def average_precision(truth, results, kind="boxes"):
    return evaluate_detections(truth, results, kind).values


TWO = [(0, 0, 40, 50), (100, 100, 40, 50)]


def test_perfect():
    found = average_precision(truth(*TWO), results(*TWO))
    assert found == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100, "AP_medium": 100})


def test_one_of_two():
    """Precision 1 up to a recall of 0.5: 51 of 101 recalls."""
    found = average_precision(truth(*TWO), results(TWO[0]))
    assert found["AP"] == pytest.approx(100 * 51 / 101)


def test_a_false_one_before_the_true_ones():
    """Precision 1/2 at recall 0.5, 2/3 at recall 1, and never less before: 2/3."""
    found = average_precision(truth(*TWO), results((0, 120, 30, 30), *TWO))
    assert found["AP"] == pytest.approx(100 * 2 / 3)


def test_a_box_that_is_shifted():
    """IoU 30 / 50 = 0.6: right at 0.50, 0.55 and 0.60 of ten."""
    found = average_precision(truth((0, 0, 40, 50)), results((10, 0, 40, 50)))
    assert found["AP50"] == pytest.approx(100) and found["AP75"] == 0
    assert found["AP"] == pytest.approx(30)


def test_the_wrong_class_is_wrong():
    found = average_precision(truth(*TWO), results(*TWO, category=1))
    assert found["AP"] == 0


def test_sizes():
    boxes = [(0, 0, 20, 20), (40, 40, 50, 50), (100, 0, 100, 100)]
    found = average_precision(truth(*boxes), results(boxes[0], boxes[2]))
    sizes = [found[f"AP_{size}"] for size in ("small", "medium", "large")]
    assert sizes == pytest.approx([100, 0, 100])


def test_a_crowd_counts_neither_way():
    found = average_precision(truth(*TWO, crowd=[1]), results(*TWO, (105, 105, 20, 20)))
    assert found["AP"] == pytest.approx(100)


def test_nothing_found():
    assert average_precision(truth(*TWO), [])["AP"] == 0


def test_masks_and_boxes_are_measured_apart():
    """Right boxes around masks that are half of what they should be: IoU 0.5 to 0.6."""
    source = open_detection("demo").test
    rows = []
    for index in range(6):
        found = objects(source, index)
        masks = found.masks.clone()
        for mask in masks:  # the upper half of its pixels
            at = mask.nonzero()
            rest = at[int(0.55 * len(at)) :]
            mask[rest[:, 0], rest[:, 1]] = False
        scores = torch.ones(len(found))
        rows += to_results(index, Detections(found.boxes, scores, found.classes, masks))
    table = ground_truth(source, range(6))
    assert average_precision(table, rows, "boxes")["AP"] == pytest.approx(100)
    halves = average_precision(table, rows, "masks")
    assert halves["AP50"] == pytest.approx(100) and halves["AP75"] == 0
    assert "area" not in rows[0]  # the results are left as they were


def images_with(*found, missed=0):
    """Truth and results of a square in each image: its IoU with the detection (None: not found),
    and images without a detection."""
    images, annotations, rows = [], [], []
    for n, iou in enumerate([*found, *[None] * missed]):
        images.append({"id": n, "height": 200, "width": 200})
        box = {"image_id": n, "category_id": 0, "bbox": [50, 50, 60, 60]}
        annotations.append(box | {"id": n + 1, "area": 3600, "iscrowd": 0, "segmentation": []})
        if iou is not None:
            rows.append(box | {"bbox": [50, 50, 60, 60 * iou], "score": 0.9})
    categories = [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}, rows


def test_intervals_of_known_ap():
    """Objects found in 8 of 20 images, with IoU 0.62: AP50 of a resample is the share of recalls
    up to that of the found, and AP three tenths of it."""
    found = evaluate_detections(*images_with(*[0.62] * 8, missed=12)).numbers(seed=0)
    assert found["AP50"] == pytest.approx(100 * 41 / 101)
    assert found["AP"] == pytest.approx(30 * 41 / 101)
    assert found["AP75"] == found["AP75_low"] == found["AP75_high"] == 0
    # Binomial: 8 of 20, 2.5th and 97.5th percentile 4 and 12.
    ends = [found["AP50_low"], found["AP50_high"]]
    assert ends == pytest.approx([100 * 21 / 101, 100 * 61 / 101], abs=1)
    assert found["AP_low"] == pytest.approx(0.3 * found["AP50_low"])
    assert evaluate_detections(*images_with(0.62)).numbers(1)["AP_high"] == pytest.approx(30)


def test_paired_differences():
    """Of two detectors one of which finds the same, and one more in every third image."""
    truth, rows = images_with(*[1.0] * 12)
    fewer = [row for row in rows if row["image_id"] % 3]
    more, less = (evaluate_detections(truth, found) for found in (rows, fewer))
    found = more.difference(less)
    assert found["AP"] == pytest.approx(more.values["AP"] - less.values["AP"])
    assert found["AP_medium"] == pytest.approx(found["AP"])
    assert 0 <= found["AP_low"] < found["AP"] < found["AP_high"]
    same = more.difference(evaluate_detections(truth, rows))
    assert [same[f"AP{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    with pytest.raises(ValueError, match="same images"):
        more.difference(evaluate_detections(*images_with(1.0)))


def test_no_object_in_any_image():
    empty = {**truth(), "annotations": []}
    found = evaluate_detections(empty, results(*TWO))
    assert found.numbers() == {}
    assert np.isnan(found.of_resamples(np.array([[1]]))).all()


def random_detections(rng, images=4):
    """Shifted boxes of two classes, false ones, a crowd, and equal scores."""
    annotations, rows = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 4)):
            box, category = rng.integers(10, 60, 4).tolist(), int(rng.integers(2))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentation": [],
                }
            )
            for _ in range(rng.integers(0, 3)):
                shifted = (np.array(box) + rng.integers(-6, 7, 4)).tolist()
                score = float(rng.choice([0.2, 0.4, 0.6, 0.8]))
                rows.append(
                    {"image_id": image, "category_id": category, "bbox": shifted, "score": score}
                )
    table = truth() | {"annotations": annotations}
    table["images"] = [{"id": n, "height": 200, "width": 200} for n in range(images)]
    return table, rows


def repeated(table, rows, counts):
    """The same with copies of the images."""
    origins = np.repeat(np.arange(len(counts)), counts).tolist()
    copies = [
        [
            entry | {"image_id": n}
            for n, origin in enumerate(origins)
            for entry in entries
            if entry["image_id"] == origin
        ]
        for entries in (table["annotations"], rows)
    ]
    annotations = [entry | {"id": n + 1} for n, entry in enumerate(copies[0])]
    images = [{"id": n, "height": 200, "width": 200} for n in range(len(origins))]
    return table | {"images": images, "annotations": annotations}, copies[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_resample_is_the_ap_of_its_images(seed, drawn):
    """As computed anew from copies of the images; and every image once is the whole."""
    table, rows = random_detections(np.random.default_rng(seed))
    counts = np.bincount(drawn, minlength=4)
    whole = evaluate_detections(table, rows)
    found = 100 * whole.of_resamples(np.stack([np.ones_like(counts), counts]))
    expected = [whole.values, average_precision(*repeated(table, rows, counts))]
    for each, values in zip(found.T, expected, strict=True):
        wanted = [values.get(name, np.nan) for name in WITH_INTERVAL]
        np.testing.assert_allclose(each, wanted, rtol=1e-12, atol=1e-12)


def test_intervals_hold_the_value_where_categories_are_rare():
    """Two objects of each of six categories: all resamples may lie above the value."""
    table, rows = images_with(*[1.0, 0.55] * 6)
    for entry in [*table["annotations"], *rows]:
        entry["category_id"] = entry["image_id"] // 2
    for row in rows:  # a detection of another category's image comes first
        row["score"] = 0.5
    rows += [row | {"category_id": (row["category_id"] + 1) % 6, "score": 0.9} for row in rows]
    table["categories"] = [{"id": n, "name": str(n)} for n in range(6)]
    whole = evaluate_detections(table, rows)
    found = whole.numbers(0)
    assert np.nanmean(whole.resampled(0)[0]) > found["AP"] / 100 + 0.01
    assert found["AP_low"] < found["AP"] < found["AP_high"]


def test_intervals_contain_the_value_and_depend_on_the_seed():
    whole = evaluate_detections(*random_detections(np.random.default_rng(0), images=12))
    assert whole.resampled(0).shape == (3, RESAMPLES)
    found, again = whole.numbers(0), whole.numbers(1)
    for name in WITH_INTERVAL:
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
        assert found[name] == again[name]
        assert found[f"{name}_low"] == pytest.approx(again[f"{name}_low"], abs=4)
    assert found["AP_low"] != again["AP_low"]


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install 'hpm-vision\[dense\]'"):
        average_precision(truth(*TWO), [])

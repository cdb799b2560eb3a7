"""Against hand-made cases whose average precision is known.

COCO's AP averages precision at 101 recalls (0, 0.01, ..., 1) and at the IoUs 0.50, 0.55, ..., 0.95.
"""

import sys

import pytest
import torch

from hpm.core.errors import UserError
from hpm.data.detection import Detections, ground_truth, objects, open_detection, to_results
from hpm.evals.detection_metrics import average_precision


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


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install 'hpm\[dense\]'"):
        average_precision(truth(*TWO), [])

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm.core import boxes as our_boxes
from hpm.core.boxes import nms, roi_align
from hpm.core.extras import need


def naive_iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else math.nan


def naive_nms(boxes, scores, threshold):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if not any(naive_iou(boxes[k], boxes[i]) > threshold for k in kept):
            kept.append(i)
    return kept


# Whole numbers, so that equal scores, equal boxes and empty ones occur.
corners = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(0, 6)] * 2)


@given(
    places=st.lists(st.tuples(corners, st.integers(0, 9)), max_size=40),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    block=st.integers(1, 50),
)
def test_nms_equals_a_naive_loop(places, threshold, block):
    boxes = torch.tensor([(x, y, x + w, y + h) for (x, y, w, h), _ in places]).float()
    boxes, scores = boxes.reshape(-1, 4), torch.tensor([score for _, score in places]).float()
    expected = naive_nms(boxes.double().tolist(), scores.tolist(), threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(our_boxes, "BLOCK", block)
        assert nms(boxes, scores, threshold).tolist() == expected


def test_nms_of_a_chain_settles_each_link():
    """Each box overlaps the next alone: every second one stays."""
    left = torch.arange(100).float()
    boxes = torch.stack([left, 0 * left, left + 1.5, 0 * left + 1], dim=1)
    assert nms(boxes, -left, 0.1).tolist() == list(range(0, 100, 2))


def test_nms_by_hand():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30.0]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.95).tolist() == [1, 0, 2]
    assert nms(boxes[:0], torch.empty(0), 0.5).tolist() == []
    empty = torch.zeros(2, 4)  # whose overlap is 0 / 0: no reason to drop one
    assert nms(empty, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1, 0]


def naive_roi_align(maps, roi, scale, rows, columns, ratio, aligned):
    index, *corners = roi.tolist()
    x0, y0, x1, y1 = (c * scale - (0.5 if aligned else 0) for c in corners)
    width, height = x1 - x0, y1 - y0
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    image = maps[int(index)]
    down = ratio if ratio > 0 else math.ceil(height / rows)
    across = ratio if ratio > 0 else math.ceil(width / columns)
    out = torch.zeros(len(image), rows, columns).double()
    for row in range(rows):
        for column in range(columns):
            for i in range(down):
                for j in range(across):
                    y = y0 + height / rows * (row + (i + 0.5) / down)
                    x = x0 + width / columns * (column + (j + 0.5) / across)
                    out[:, row, column] += naive_sample(image, y, x) / (down * across)
    return out


def naive_sample(image, y, x):
    rows, columns = image.shape[1:]
    if y < -1 or y > rows or x < -1 or x > columns:
        return torch.zeros(len(image)).double()
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
    above = image[:, y0, x0] * (1 - x + x0) + image[:, y0, x1] * (x - x0)
    below = image[:, y1, x0] * (1 - x + x0) + image[:, y1, x1] * (x - x0)
    return above * (1 - y + y0) + below * (y - y0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("size", [(6, 9), (1, 4)])
def test_roi_align_equals_a_naive_one_in_float64(aligned, ratio, size):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *size).double().requires_grad_()
    start = torch.rand(12, 2) * 50 - 20  # many boxes reach over the border
    rois = torch.cat([torch.arange(12)[:, None] % 2, start, start + torch.rand(12, 2) * 50], dim=1)
    rois = rois.double()
    found = roi_align(maps, rois, 0.25, 3, 2, ratio, aligned)
    expected = torch.stack([naive_roi_align(maps, r, 0.25, 3, 2, ratio, aligned) for r in rois])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    [gradient] = torch.autograd.grad((found * weight).sum(), maps)
    [expected] = torch.autograd.grad((expected * weight).sum(), maps)
    torch.testing.assert_close(gradient, expected)


def test_roi_align_of_no_boxes():
    maps = torch.randn(1, 3, 4, 4)
    assert roi_align(maps, torch.zeros(0, 5), 1.0, 2, 2, 2, False).shape == (0, 3, 2, 2)


def test_torchvision_agrees():
    """Its own operators where they are there, else ours."""
    ops = need("torchvision.ops", "finetune", "x")
    boxes = torch.rand(50, 4) * 20
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(50)
    assert torch.equal(ops.nms(boxes, scores, 0.5), nms(boxes, scores, 0.5))
    maps, rois = torch.randn(1, 3, 10, 10), torch.cat([torch.zeros(50, 1), boxes], dim=1)
    found = ops.roi_align(maps, rois, (7, 5), 0.25, 2)
    torch.testing.assert_close(found, roi_align(maps, rois, 0.25, 7, 5, 2, False))

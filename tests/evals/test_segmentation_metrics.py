import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm.evals.segmentation_metrics import (
    PixelCounts,
    confusion_matrices,
    count_pixels,
    iou_per_class,
    segmentation_difference,
    segmentation_scores,
)

CLASSES = 4


def draw(seed, images=3, classes=CLASSES, wrong=0.4, size=(5, 7)):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (images, *size))
    guesses = rng.integers(0, classes, labels.shape)
    predicted = np.where(rng.random(labels.shape) < wrong, guesses, labels)
    labels[rng.random(labels.shape) < 0.2] = 255
    return torch.from_numpy(predicted), torch.from_numpy(labels.astype(np.uint8))


def counted(predicted, labels, classes=CLASSES):
    return count_pixels(confusion_matrices(predicted, labels, classes))


def naive(predicted, labels, classes=CLASSES):
    """Pixel by pixel, in float64."""
    pairs = [
        (int(t), int(p)) for t, p in zip(labels.flatten(), predicted.flatten()) if int(t) != 255
    ]
    ious, accuracies = [], []
    for c in range(classes):
        hits = sum(t == p == c for t, p in pairs)
        truth = sum(t == c for t, _ in pairs)
        either = sum(c in pair for pair in pairs)
        ious += [hits / either] if either else []
        accuracies += [hits / truth] if truth else []
    right = sum(t == p for t, p in pairs) / len(pairs)
    return {
        "mean_iou": 100 * np.mean(ious),
        "mean_accuracy": 100 * np.mean(accuracies),
        "pixel_accuracy": 100 * right,
    }


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_scores_are_those_of_a_naive_count(seed, classes):
    predicted, labels = draw(seed, classes=classes)
    found = segmentation_scores(counted(predicted, labels, classes + 1))
    for name, value in naive(predicted, labels, classes + 1).items():
        assert found[name] == pytest.approx(value)


@given(st.integers(0, 10_000))
def test_laws(seed):
    predicted, labels = draw(seed)
    matrices = confusion_matrices(predicted, labels, CLASSES)
    assert matrices.sum() == (labels != 255).sum()
    swapped = confusion_matrices(torch.where(labels == 255, 0, labels.long()), labels, CLASSES)
    assert segmentation_scores(count_pixels(swapped))["mean_iou"] == pytest.approx(100)
    scores = segmentation_scores(count_pixels(matrices))
    order = torch.tensor([2, 0, 3, 1])  # another numbering of the classes changes nothing
    renamed = torch.cat([order, torch.full((252,), 255)])[labels.long()]
    again = segmentation_scores(counted(order[predicted], renamed))
    assert again == pytest.approx(scores)
    for name in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        assert scores[f"{name}_low"] <= scores[f"{name}_high"]


def test_a_known_case():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 0], [0, 0, 1, 1]]])
    counts = counted(predicted, labels, 3)
    assert iou_per_class(counts, ["a", "b", "c"]) == pytest.approx({"a": 80, "b": 200 / 3})
    scores = segmentation_scores(counts)
    assert scores["mean_iou"] == pytest.approx((80 + 200 / 3) / 2)
    assert scores["mean_accuracy"] == pytest.approx((100 + 200 / 3) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(600 / 7)


def test_a_class_that_is_only_predicted_counts_as_missed():
    counts = counted(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]), 3)
    assert iou_per_class(counts, "abc") == {"a": 50, "c": 0}
    assert segmentation_scores(counts)["mean_iou"] == 25
    assert segmentation_scores(counts)["mean_accuracy"] == 50


def test_nothing_labelled():
    counts = counted(torch.zeros(2, 3, 3).long(), torch.full((2, 3, 3), 255), 2)
    assert all(np.isnan(value) for value in segmentation_scores(counts).values())
    assert iou_per_class(counts, "ab") == {}


def test_intervals_are_those_of_images():
    """Images that are all alike leave nothing to chance; images that differ do."""
    predicted, labels = draw(0, images=1)
    alike = counted(predicted.expand(20, -1, -1), labels.expand(20, -1, -1))
    scores = segmentation_scores(alike)
    assert scores["mean_iou_low"] == pytest.approx(scores["mean_iou_high"])
    few = segmentation_scores(counted(*draw(0, images=10)))
    many = segmentation_scores(counted(*draw(0, images=160)))
    widths = [s["pixel_accuracy_high"] - s["pixel_accuracy_low"] for s in (few, many)]
    assert 2 < widths[0] / widths[1] < 8  # the root of 16, roughly


def test_a_difference_is_taken_in_pairs():
    predicted, labels = draw(3, images=40)
    better = predicted.clone()
    better[:, 0] = torch.where(labels[:, 0] == 255, 0, labels[:, 0].long())
    first, second = counted(better, labels), counted(predicted, labels)
    found = segmentation_difference(first, second)
    scores = [segmentation_scores(counts) for counts in (first, second)]
    assert found["mean_iou"] == pytest.approx(scores[0]["mean_iou"] - scores[1]["mean_iou"])
    width = found["mean_iou_high"] - found["mean_iou_low"]
    assert found["mean_iou_low"] > 0
    assert width < scores[1]["mean_iou_high"] - scores[1]["mean_iou_low"]
    assert set(segmentation_difference(first, first).values()) == {0}
    with pytest.raises(ValueError, match="not measured on the same images"):
        segmentation_difference(first, counted(*draw(4, images=40)))


def rare_classes(seed, images, classes):
    """Counts of simulated images, each with four classes of which some are rare; most mistakes are
    for another class of the image."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    share /= share.sum()
    hits, truth, predicted = np.zeros((3, images, classes), dtype=np.int64)
    for image in range(images):
        present = rng.choice(classes, 4, replace=False, p=share)
        truth[image, present] = rng.integers(200, 3000, 4)
        hits[image, present] = truth[image, present] * rng.beta(4, 2, 4)
        predicted[image] += hits[image]
        for missed in np.repeat((truth - hits)[image, present] // 3, 3):
            near = rng.random() < 0.7
            other = rng.choice(present) if near else rng.choice(classes, p=share)
            predicted[image, other] += missed
    return PixelCounts(hits, truth, predicted)


def test_intervals_hold_the_expected_value_where_classes_are_rare():
    """A resample misses all images of some classes, which are predicted all the same."""
    found = [segmentation_scores(rare_classes(seed, 100, 80)) for seed in range(40)]
    expected = np.mean([scores["mean_iou"] for scores in found])
    held = [s["mean_iou_low"] <= expected <= s["mean_iou_high"] for s in found]
    assert np.mean(held) > 0.85
    assert all(s["mean_iou_low"] < s["mean_iou"] < s["mean_iou_high"] for s in found)


def test_differences_are_centred_where_classes_are_rare():
    counts = rare_classes(0, 200, 150)
    first_alone = np.zeros_like(counts.predicted)  # the first class, predicted everywhere
    first_alone[:, 0] = counts.truth.sum(1)
    other = PixelCounts(np.minimum(counts.truth, first_alone), counts.truth, first_alone)
    found = segmentation_difference(counts, other)
    assert found["mean_iou_low"] < found["mean_iou"] < found["mean_iou_high"]

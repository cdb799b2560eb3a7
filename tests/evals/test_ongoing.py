"""The images of the probe during pre-training."""

import numpy as np
import pytest
import torch

import hpm
from hpm.data.sources import Splits
from hpm.evals import ongoing
from hpm.evals.features import Features
from hpm.evals.ongoing import MAX_IMAGES, K, OngoingProbe


class Images:
    """Of classes of these sizes."""

    name = "photos"

    def __init__(self, *sizes):
        self.classes = [f"class {number}" for number in range(len(sizes))]
        self.labels = np.repeat(np.arange(len(sizes)), sizes)

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return str(index)

    def is_deep(self):
        return False

    def open(self, index):
        raise NotImplementedError

    read = open


def probe_of(monkeypatch, *sizes, seed=0):
    splits = Splits(Images(*sizes), Images(1))
    monkeypatch.setattr(ongoing, "open_source", lambda data: splits)
    return OngoingProbe("photos", seed, 0)


@pytest.mark.parametrize("seed", range(3))
def test_many_images_with_rare_classes(monkeypatch, seed):
    """Without regard to classes, a draw of one in 75 images would miss the rare ones."""
    data = probe_of(monkeypatch, *[300_000] * 5, *[15] * 10, 3, seed=seed).data
    assert len(data.train) + len(data.test) == MAX_IMAGES
    paths = [part.path(i) for part in (data.train, data.test) for i in range(len(part))]
    assert len(set(paths)) == MAX_IMAGES
    learned, tested = (np.bincount(x, minlength=16) for x in (data.train_labels, data.test_labels))
    assert (learned >= 2).all() and (tested >= 1).all()
    assert (abs((learned + tested)[:5] - MAX_IMAGES / 5) < 300).all()  # the others as they come


def test_few_images_are_all_taken(monkeypatch):
    data = probe_of(monkeypatch, 30, 20, 3).data
    assert np.bincount(np.r_[data.train_labels, data.test_labels]).tolist() == [30, 20, 3]


def test_fewer_readable_images_than_neighbours(monkeypatch):
    probe = probe_of(monkeypatch, 13, 13)
    assert len(probe.data.train) > K
    labels = torch.arange(K - 1) % 2
    rows = Features(torch.nn.functional.one_hot(labels).float(), labels)
    assert probe._judged(rows, rows, torch.device("cpu")) == {"knn": 100, "linear": 100}


@pytest.mark.parametrize("large", [30, 30_000])
def test_a_class_of_two_images(monkeypatch, large):
    words = "leaves 2 images of class 'class 1', and each class takes 3"
    with pytest.raises(hpm.UserError, match=words):
        probe_of(monkeypatch, large, 2)


def test_too_many_classes(monkeypatch):
    with pytest.raises(hpm.UserError, match="7,000 classes, and 3 images of each are more than"):
        probe_of(monkeypatch, *[4] * 7000)

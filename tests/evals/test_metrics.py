import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm.evals.classes import by_class
from hpm.evals.metrics import TrueClassRanks, accuracies, bootstrap_interval, difference, join, rank


def ranked(ranks, labels=None):
    ranks = torch.tensor(ranks)
    labels = torch.zeros_like(ranks) if labels is None else torch.tensor(labels)
    return TrueClassRanks(ranks, labels)


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_rank_zero_is_argmax(seed, classes):
    """With few distinct scores, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (20, classes), generator=generator).float()
    labels = torch.randint(0, classes, (20,), generator=generator)
    found = rank(scores, labels)
    assert torch.equal(found.ranks == 0, scores.argmax(1) == labels)
    assert ((found.ranks >= 0) & (found.ranks < classes)).all()


def test_a_score_that_is_no_number_is_never_right():
    nan = float("nan")
    scores = torch.tensor([[nan, nan, nan], [nan, 0.0, 1.0], [nan, 0.0, 1.0], [1.0, nan, 2.0]])
    assert rank(scores, torch.tensor([0, 0, 2, 0])).ranks.tolist() == [2, 2, 0, 1]


def test_known_accuracies():
    values = accuracies(ranked([0, 0, 1, 5, 0, 9], [0, 0, 0, 0, 1, 1]))
    assert values["top1"] == pytest.approx(50)
    assert values["top5"] == pytest.approx(100 * 4 / 6)
    assert values["mean_per_class"] == pytest.approx(50)  # 2 of 4 and 1 of 2
    assert values["top1_low"] < 50 < values["top1_high"]


def test_the_interval_covers_as_it_says():
    """Of many samples of a coin that lands right in 70 %, about 95 % of the intervals hold 0.7."""
    rng = np.random.default_rng(0)
    samples = rng.random((300, 400)) < 0.7
    ends = [bootstrap_interval(sample.astype(float)) for sample in samples]
    covered = np.mean([low <= 0.7 <= high for low, high in ends])
    assert 0.9 < covered < 0.99
    # The textbook's width: 2 x 1.96 standard errors.
    width = np.mean([high - low for low, high in ends])
    assert width == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 400) ** 0.5, rel=0.05)


def test_a_difference_is_taken_in_pairs():
    first, second = ranked([0] * 60 + [1] * 40), ranked([0] * 55 + [1] * 45)
    found = difference(first, second)
    assert found["top1"] == pytest.approx(5)
    # Five images tell them apart: far narrower than two intervals of +-10.
    assert 0 < found["top1_low"] <= 2 and 8 <= found["top1_high"] < 11
    assert difference(first, first) == {"top1": 0, "top1_low": 0, "top1_high": 0}
    with pytest.raises(ValueError, match="not measured on the same images"):
        difference(first, ranked([0] * 100, [1] * 100))


def test_join():
    whole = join([ranked([0, 1], [1, 2]), ranked([2], [0])])
    assert whole.ranks.tolist() == [0, 1, 2] and whole.labels.tolist() == [1, 2, 0]


@given(st.integers(0, 10_000), st.integers(1, 30))
def test_images_by_class(seed, classes):
    rng = np.random.default_rng(seed)
    labels = 3 * rng.integers(0, classes, 50)  # some labels do not occur
    found = list(by_class(labels))
    assert [label for label, _ in found] == np.unique(labels).tolist()
    for label, members in found:
        assert members.tolist() == np.flatnonzero(labels == label).tolist()
    right = rng.integers(0, 2, 50)
    values = accuracies(TrueClassRanks(torch.from_numpy(right), torch.from_numpy(labels)))
    means = [(right[members] == 0).mean() for _, members in found]
    assert values["mean_per_class"] == pytest.approx(100 * np.mean(means))

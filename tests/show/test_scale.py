"""Predicted losses on the scale of actual ones."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpm.show.scale import Scale, as_losses, bar, scale_of

numbers = st.floats(-100, 100, width=32)


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, (2, 9), elements=numbers), arrays(np.float32, (2, 9), elements=numbers))
def test_the_order_stays_and_the_values_are_actual_ones(predicted, actual):
    drawn = as_losses(predicted, actual)
    for p, d, a in zip(predicted, drawn, actual):
        order = np.argsort(p, kind="stable")
        assert (np.diff(d[order]) >= -1e-4).all()
        assert a.min() - 1e-4 <= d.min() and d.max() <= a.max() + 1e-4
        if len(np.unique(p)) == len(p):
            assert np.allclose(np.sort(d), np.sort(a), atol=1e-4)


def test_a_perfect_order_gives_the_same_map():
    actual = np.random.default_rng(0).random((3, 16)).astype(np.float32)
    assert np.allclose(as_losses(7 * actual - 3, actual), actual, atol=1e-6)


def test_ties_share_a_colour_and_unknown_losses_do_not_matter():
    drawn = as_losses(np.array([[1.0, 1.0, 2.0]]), np.array([[0.0, 4.0, np.nan]]))
    assert drawn.tolist() == [[1.0, 1.0, 4.0]]
    assert np.isnan(as_losses(np.ones((1, 2)), np.full((1, 2), np.nan))).all()


def test_a_scale_leaves_outliers_out():
    losses = np.append(np.linspace(0, 1, 1000), [50.0, np.nan])
    low, high = scale_of(losses)
    assert 0 <= low < 0.05 and 0.95 < high < 1.1
    assert scale_of(np.array([np.nan])) is None
    assert "0.5" in bar(scale_of(np.array([0.5, 0.5])))


def test_the_ends_of_a_bar_differ_in_words():
    assert Scale(0.0234, 2.6).words == ("0.023", "2.6")
    assert Scale(1.004, 1.07).words == ("1.00", "1.07")

"""Soft mining: the mined patches are drawn by a temperature."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm.mining import masking
from hpm.mining.draw import Draw
from hpm.mining.strategies import random

GRID, NUM_HIDDEN = (4, 4), 6


def hidden(signal, temperature, num_hard=NUM_HIDDEN, mask="easy_to_hard", epoch=0):
    draw = Draw(0, epoch, torch.arange(len(signal)))
    return masking.make_mask(mask, draw, GRID, NUM_HIDDEN, signal, num_hard, temperature)[1]


@given(num_hard=st.integers(0, NUM_HIDDEN), seed=st.integers(0, 100))
def test_temperature_zero_takes_the_top_of_the_list(num_hard, seed):
    signal = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    draw = Draw(seed, 1, torch.arange(6))
    expected = masking.hide_top(
        masking.hardest_first(random(draw, GRID, NUM_HIDDEN), signal, num_hard), NUM_HIDDEN
    )
    found = masking.make_mask("moderate", draw, GRID, NUM_HIDDEN, signal, num_hard, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    # And a temperature near zero comes to the same.
    assert torch.equal(hidden(signal, 1e-4, num_hard), hidden(signal, 0.0, num_hard))


def test_a_high_temperature_is_uniform_whatever_the_signal():
    signal = torch.linspace(-3, 3, 16).expand(8000, -1).contiguous()
    found = hidden(signal, 1e9)
    assert torch.equal(found, hidden(-signal, 1e9))
    share = masking.to_mask(found, 16).float().mean(0)
    expected = NUM_HIDDEN / 16
    assert (share - expected).abs().max() < 4.5 * (expected * (1 - expected) / 8000) ** 0.5


def plackett_luce(scores, count):
    """Probability of each set of draws without replacement, by going through all orders."""
    weights = np.exp(np.asarray(scores, np.float64))
    found = {}
    for order in itertools.permutations(range(len(scores)), count):
        left, probability = weights.sum(), 1.0
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + probability
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("mask", ["hardest", "easiest"])
def test_sets_are_as_frequent_as_plackett_luce_says(temperature, mask):
    values, draws = np.array([0.1, 3.0, 1.0, 1.5, -2.0, 0.7]), 20000
    standardised = (values - values.mean()) / values.std()
    sign = -1 if mask == "easiest" else 1
    expected = plackett_luce(sign * standardised / temperature, 3)
    assert math.fsum(expected.values()) == pytest.approx(1)
    signal = torch.tensor(values, dtype=torch.float32).expand(draws, -1)
    draw = Draw(5, 2, torch.arange(draws))
    _, ids = masking.make_mask(mask, draw, (2, 3), 3, signal, 3, temperature)
    counts = dict.fromkeys(expected, 0)
    for row in ids.tolist():
        counts[frozenset(row)] += 1
    # Sets that are rarer than 10 in all draws are counted together.
    rare = [s for s, p in expected.items() if draws * p < 10]
    pairs = [(counts[s], draws * p) for s, p in expected.items() if s not in rare]
    pairs.append((sum(counts[s] for s in rare), 1e-9 + sum(draws * expected[s] for s in rare)))
    chi_square = sum((found - wanted) ** 2 / wanted for found, wanted in pairs)
    assert chi_square < len(pairs) + 5 * (2 * len(pairs)) ** 0.5


@given(
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    num_hard=st.integers(1, NUM_HIDDEN),
)
def test_scale_and_offset_of_the_signal_do_not_matter(scale, shift, num_hard):
    signal = torch.randn(4, 16, generator=torch.Generator().manual_seed(num_hard)).double()
    draw = Draw(0, 0, torch.arange(4))
    one, other = (masking.perturb(s.float(), draw, 0.7) for s in (signal, scale * signal + shift))
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf, -torch.inf])
def test_counts_are_exact_whatever_the_signal(broken):
    signal = torch.randn(3, 16)
    signal[:, ::2], signal[1] = broken, broken
    found = hidden(signal, 1.0, num_hard=4)
    assert (masking.to_mask(found, 16).sum(1) == NUM_HIDDEN).all()


def test_patches_of_no_known_loss_come_last():
    signal = torch.randn(50, 16)
    signal[:, 6:] = -torch.inf
    assert torch.equal(hidden(signal, 5.0), torch.arange(6).expand(50, -1))
    assert not torch.equal(hidden(signal, 5.0, 3), hidden(signal, 5.0, 3, epoch=1))

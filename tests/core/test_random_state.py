"""The random states of a program that calls hpm."""

import random

import numpy as np
import pytest
import torch

from hpm.core.random_state import random_state_kept


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_afterwards_is_the_same(fails):
    def block():
        with random_state_kept(torch.device("cpu")):
            draw()
            if fails:
                raise KeyError

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if fails:
        with pytest.raises(KeyError):
            block()
    else:
        block()
    assert draw() == expected


def test_the_generator_of_an_apple_gpu(monkeypatch):
    kept = [torch.tensor([1])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: kept[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    with random_state_kept(torch.device("mps")):
        kept.append(torch.tensor([2]))
    assert [int(state) for state in kept] == [1, 2, 1]

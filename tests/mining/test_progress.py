"""Mining by the progress of the loss: what still falls, not what stays high."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_memory import WHOLE, naive_overlap, naive_write

from hpm.mining.memory import DECAY, PRIOR_WEIGHT, SLOW_DECAY, HardnessMemory


def naive_progress(fast, slow, crop, grid):
    """One view, patch by patch and cell by cell."""
    rows, columns = grid
    values = np.zeros(grid)
    for i in range(rows):
        for j in range(columns):
            total = weight = area = 0.0
            for y in range(rows):
                for x in range(columns):
                    share = naive_overlap(crop[0], crop[1], rows, i, y)
                    share *= naive_overlap(crop[2], crop[3], columns, j, x)
                    area += share
                    if fast[1, y, x] > 0:
                        fallen = slow[0, y, x] / slow[1, y, x] - fast[0, y, x] / fast[1, y, x]
                        total += share * fast[1, y, x] * fallen
                        weight += share * fast[1, y, x]
            values[i, j] = total / area / (weight / area + PRIOR_WEIGHT)
    return values.ravel()


def test_progress_as_cell_by_cell():
    """Eight visits of random views, some flipped, of a grid that is not square; losses fall."""
    grid, rng = (4, 3), np.random.default_rng(0)
    memory = HardnessMemory(6, grid, progress=True)
    fast, slow = np.zeros((6, 2, *grid)), np.zeros((6, 2, *grid))
    for visit in range(8):
        ids = rng.permutation(6)[:4]
        low, high = rng.uniform(0, 0.4, (4, 2)), rng.uniform(0.6, 1, (4, 2))
        crops = np.stack([low[:, 0], high[:, 0], high[:, 1], low[:, 1]], 1)
        patches = np.stack([rng.permutation(12)[:7] for _ in range(4)])
        losses = rng.uniform(0, 2, (4, 7)) * 0.7**visit
        memory.write(*map(torch.from_numpy, (ids, crops.astype(np.float32), patches, losses)))
        for row, index in enumerate(ids):
            seen = crops[row], patches[row], losses[row], grid
            fast[index] = naive_write(fast[index], *seen, DECAY)
            slow[index] = naive_write(slow[index], *seen, SLOW_DECAY)
    np.testing.assert_allclose(memory.found, fast, atol=5e-3)
    np.testing.assert_allclose(memory.slow, slow, atol=5e-3)
    crops = torch.tensor([[0.1, 0.9, 0.8, 0.3]] * 6)
    found = memory.read(torch.arange(6), crops)
    expected = [naive_progress(*pair, crops[0].tolist(), grid) for pair in zip(fast, slow)]
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-3)


def remember(losses, progress=True, crops=None):
    """What is read of one image after visits with these losses [visits patches]."""
    losses = torch.as_tensor(losses, dtype=torch.float32)
    visits, count = losses.shape
    memory = HardnessMemory(1, (1, count), progress=progress)
    for number in range(visits):
        crop = torch.tensor([WHOLE]) if crops is None else crops[number : number + 1]
        memory.write(torch.tensor([0]), crop, torch.arange(count)[None], losses[number][None])
    return memory.read(torch.tensor([0]), torch.tensor([WHOLE]))[0]


@given(st.lists(st.floats(0, 1000), min_size=2, max_size=5), st.integers(1, 12), st.integers(0, 99))
def test_losses_that_stay_make_no_progress(levels, visits, seed):
    """However high they are."""
    found = remember([levels] * visits)
    assert (found.abs() <= 3e-3 * torch.tensor(levels) + 1e-3).all()
    # Nor does a place that was hard beside an easy one, seen in different views.
    low = np.random.default_rng(seed).uniform(0, 0.5, visits)
    crops = torch.tensor([[0.0, 1.0, edge, edge + 0.5] for edge in low], dtype=torch.float32)
    assert remember([[1.0] * 4] * visits, crops=crops).abs().max() < 4e-3


@given(st.lists(st.floats(0.05, 0.5), min_size=2, max_size=12), st.floats(0, 5))
def test_the_sign_is_that_of_the_fall(steps, level):
    falling = level + np.cumsum(steps)[::-1]
    found = remember(np.stack([falling, falling[::-1]], 1))
    assert found[0] > 0 > found[1]
    assert found[0].item() == pytest.approx(-found[1].item(), abs=0.1)


def test_noise_is_mined_by_loss_and_not_by_progress():
    """Three places: noise, which stays hard; something that is being learned; something learned."""
    visits = np.arange(15)
    losses = np.stack([0 * visits + 1.0, 0.9 * 0.9**visits + 0.05, 0 * visits + 0.05], 1)
    assert remember(losses, progress=False).argmax() == 0
    assert remember(losses).argmax() == 1
    assert remember(losses[:1]).abs().max() < 1e-3  # seen once: nothing is known yet


def test_sums_stay_finite():
    losses = np.full((60, 2), 1e9)
    assert remember(losses).isfinite().all()


def test_only_progress_has_a_second_average():
    plain, progress = (HardnessMemory(3, (2, 2), progress=p) for p in (False, True))
    assert set(plain.state_dict()) == {"found"} and set(progress.state_dict()) == {"found", "slow"}
    assert progress.nbytes == 2 * plain.nbytes == 2 * 3 * 4 * 4

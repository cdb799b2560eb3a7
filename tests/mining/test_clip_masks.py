"""Masks, mining and memory of clips; a clip of one frame is an image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm.core.choices import HARD_SHARES
from hpm.mining.draw import Draw
from hpm.mining.masking import (
    choose_decoded,
    make_mask,
    num_hidden_patches,
    random_mask,
    to_mask,
)
from hpm.mining.memory import DECAY, PRIOR_WEIGHT, HardnessMemory
from hpm.mining.strategies import AT_ALL_TIMES, STRATEGIES

GRID = (4, 6, 8)
DRAW = Draw(2, 1, torch.arange(5))


@pytest.mark.parametrize("mask", [m for m in STRATEGIES if m not in AT_ALL_TIMES])
def test_masks_of_three_axes_have_exact_counts(mask):
    count = math.prod(GRID)
    num_hidden = num_hidden_patches(count, 0.875)
    visible, hidden = make_mask(mask, DRAW, GRID, num_hidden)
    both = torch.cat([visible, hidden], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(count).expand(5, -1))
    assert hidden.shape == (5, num_hidden)
    if mask != "random":
        return
    by_time = to_mask(hidden, count).unflatten(1, GRID)
    assert not torch.equal(by_time[:, 0], by_time[:, 1])


def test_a_block_lasts_a_while():
    """One cube of as many patches along each axis as the grid has."""
    hidden = make_mask("block", DRAW, (8, 8, 8), 64)[1]
    for sample in hidden:
        places = np.stack(np.unravel_index(sample.numpy(), (8, 8, 8)))
        assert (places.max(1) - places.min(1) == 3).all()


@given(
    st.sampled_from([*HARD_SHARES, *AT_ALL_TIMES]),
    st.sampled_from(["mean", "max"]),
    st.floats(0.1, 0.9),
    st.floats(0, 1),
    st.sampled_from([1, 2]),
    st.integers(1, 4),
)
def test_tubes_are_the_mask_of_an_image_at_all_times(mask, tubes, ratio, share, unit, times):
    """That of the mean or maximum of the signal over time; of one frame, the image's."""
    places = (6, 8)
    num_hidden = num_hidden_patches(times * 48, ratio, times)
    assert num_hidden == times * num_hidden_patches(48, ratio)
    signal = torch.randn(5, times, 48)
    num_hard = int(share * num_hidden)
    found = make_mask(
        mask, DRAW, (times, *places), num_hidden, signal.flatten(1), num_hard, 0.0, unit, tubes
    )
    of_places = signal.amax(1) if tubes == "max" else signal.mean(1)
    image = make_mask(
        mask, DRAW, places, num_hidden // times, of_places, num_hard // times, 0.0, unit
    )
    for ids, expected in zip(found, image, strict=True):
        assert torch.equal(ids, ids.sort(dim=1).values)
        by_time = to_mask(ids, times * 48).unflatten(1, (times, 48))
        for time in range(times):
            assert torch.equal(by_time[:, time], to_mask(expected, 48))


def test_random_tubes():
    visible, hidden = random_mask(DRAW, GRID, 0.9, tubes="max", purpose=3)
    by_time = to_mask(hidden, math.prod(GRID)).unflatten(1, (4, 48))
    assert (by_time == by_time[:, :1]).all() and by_time[:, 0].sum(1).eq(44).all()
    assert visible.shape == (5, 4 * 4)
    assert not torch.equal(hidden, random_mask(DRAW, GRID, 0.9, "max", 4)[1])


@given(st.floats(0.01, 0.99), st.sampled_from([GRID, (6, 8), (3, 5, 7)]), st.floats(0.3, 0.95))
def test_decoded_patches_are_a_share_of_the_hidden_ones(keep, grid, ratio):
    hidden = random_mask(DRAW, grid, ratio)[1]
    decoded = choose_decoded(DRAW, hidden, keep, grid)
    assert decoded.shape == (5, max(1, int(hidden.shape[1] * keep)))
    for sample, among in zip(decoded.tolist(), hidden.tolist(), strict=True):
        assert sample == sorted(set(sample)) and set(sample) <= set(among)


def test_cells_run():
    """Of all patches, half: two of each cell of 2 x 2 at a time, and the others two times later."""
    hidden = torch.arange(math.prod(GRID)).expand(5, -1)
    chosen = to_mask(choose_decoded(DRAW, hidden, 0.5, GRID), math.prod(GRID)).unflatten(1, GRID)
    cells = chosen.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)  # [B T rows columns 4]
    assert (cells.sum(-1) == 2).all()
    assert torch.equal(chosen[:, 0], ~chosen[:, 2]) and not torch.equal(chosen[:, 0], chosen[:, 1])
    starts = {tuple(sample[0, :2, :2].flatten().tolist()) for sample in chosen}
    assert len(starts) > 1


def share_of(edges, count, patch, cell):
    a, b = (edges[0] + (edges[1] - edges[0]) * (patch + i) / count for i in (0, 1))
    return max(0.0, min(max(a, b), (cell + 1) / count) - max(min(a, b), cell / count))


def test_the_memory_of_videos_as_cell_by_cell():
    """Two visits of random crops and times, some flipped."""
    grid, rng = (3, 2, 4), np.random.default_rng(0)
    memory = HardnessMemory(4, grid)
    total, weight = np.zeros((4, *grid)), np.zeros((4, *grid))
    edges = None
    for _ in range(2):
        ids = rng.permutation(4)[:3]
        edges = np.sort(rng.uniform(0, 1, (3, 3, 2)), axis=2)
        edges[0, 2] = edges[0, 2, ::-1]
        patches = np.stack([rng.permutation(24)[:9] for _ in ids])
        losses = rng.uniform(0, 2, patches.shape)
        times, crops = (torch.tensor(e, dtype=torch.float32) for e in (edges[:, 0], edges[:, 1:]))
        ids_, patches_, losses_ = map(torch.from_numpy, (ids, patches, losses))
        memory.write(ids_, crops.flatten(1), patches_, losses_, times)
        normal = (losses - losses.mean()) / losses.std()
        for row, index in enumerate(ids):
            total[index] *= DECAY
            weight[index] *= DECAY
            for patch, value in zip(patches[row], normal[row], strict=True):
                place = np.unravel_index(patch, grid)
                for cell in np.ndindex(*grid):
                    share = math.prod(
                        n * share_of(e, n, p, c)
                        for e, n, p, c in zip(edges[row], grid, place, cell, strict=True)
                    )
                    total[index][cell] += share * value
                    weight[index][cell] += share
    np.testing.assert_allclose(memory.found[:, 0], total, atol=5e-3)
    np.testing.assert_allclose(memory.found[:, 1], weight, atol=5e-3)
    times, crops = torch.tensor([[0.2, 0.7]]), torch.tensor([[0.1, 0.8, 0.9, 0.3]])
    found = memory.read(torch.tensor([ids[0]]), crops, times)[0].view(grid)
    edges = [(0.2, 0.7), (0.1, 0.8), (0.9, 0.3)]
    for place in np.ndindex(*grid):
        shares = {
            cell: math.prod(
                share_of(e, n, p, c) for e, n, p, c in zip(edges, grid, place, cell, strict=True)
            )
            for cell in np.ndindex(*grid)
        }
        area = sum(shares.values())
        values = sum(share * total[ids[0]][cell] for cell, share in shares.items()) / area
        known = sum(share * weight[ids[0]][cell] for cell, share in shares.items()) / area
        assert found[place] == pytest.approx(values / (known + PRIOR_WEIGHT), abs=2e-2)


def test_the_memory_of_one_frame_is_that_of_an_image():
    image, clip = HardnessMemory(2, (4, 4)), HardnessMemory(2, (1, 4, 4))
    ids, crops = torch.arange(2), torch.tensor([[0.1, 0.9, 0.8, 0.3]] * 2)
    patches, losses = torch.arange(16).expand(2, -1)[:, ::3], torch.rand(2, 6)
    whole = torch.tensor([[0.0, 1.0]] * 2)
    image.write(ids, crops, patches, losses)
    clip.write(ids, crops, patches, losses, whole)
    assert torch.equal(image.found, clip.found[:, :, 0])
    assert torch.equal(image.read(ids, crops), clip.read(ids, crops, whole))

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpm.mining import masking
from hpm.mining.draw import Draw, noise
from hpm.mining.strategies import BUILT_IN


def naive_hidden(noise, predicted_loss, num_hidden, num_hard):
    """The sampler as a loop over images and patches."""
    hidden = []
    for row_noise, row_loss in zip(noise.tolist(), predicted_loss.tolist(), strict=True):
        by_loss = sorted(range(len(row_loss)), key=lambda i: -row_loss[i])
        hard = by_loss[:num_hard]
        others = sorted(
            (i for i in range(len(row_loss)) if i not in hard), key=lambda i: -row_noise[i]
        )
        hidden.append(sorted(hard + others[: num_hidden - num_hard]))
    return hidden


@settings(max_examples=60, deadline=None)
@given(
    num_patches=st.integers(2, 80),
    batch=st.integers(1, 4),
    ratio=st.floats(0.01, 0.99),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_sampler_equals_a_naive_loop(num_patches, batch, ratio, share, seed):
    num_hidden = masking.num_hidden_patches(num_patches, ratio)
    num_hard = int(num_hidden * share)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, num_patches, generator=generator, dtype=torch.float64).float()
    loss = torch.randn(batch, num_patches, generator=generator)
    if any(len(set(row.tolist())) < num_patches for row in [*noise, *loss]):
        return  # ties have no one right answer
    priority = masking.hardest_first(noise, loss, num_hard)
    visible_ids, hidden_ids = masking.hide_top(priority, num_hidden)
    assert hidden_ids.tolist() == naive_hidden(noise, loss, num_hidden, num_hard)
    everything = torch.cat([visible_ids, hidden_ids], 1).sort(1).values
    assert (everything == torch.arange(num_patches)).all()


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf])
def test_counts_are_exact_whatever_the_priorities(broken):
    priority = torch.full((3, 10), broken)
    visible_ids, hidden_ids = masking.hide_top(masking.hardest_first(priority, priority, 4), 7)
    assert visible_ids.shape == (3, 3) and hidden_ids.shape == (3, 7)
    mask = masking.to_mask(hidden_ids, 10)
    assert (mask.sum(1) == 7).all()
    assert not mask.gather(1, visible_ids).any()


@given(st.integers(1, 400), st.floats(0.01, 0.99))
def test_number_of_hidden_patches(num_patches, ratio):
    hidden = masking.num_hidden_patches(num_patches, ratio)
    assert hidden == num_patches - int(num_patches * (1 - ratio))
    assert 0 <= hidden <= num_patches


def test_hard_share_rises_linearly_and_stops():
    assert masking.hard_share(1 / 200) == pytest.approx(0.5 / 200)
    assert masking.hard_share(100 / 200) == pytest.approx(0.25)
    assert masking.hard_share(1.0) == 0.5
    assert masking.hard_share(1.0, start=0.8, end=0.2) == pytest.approx(0.2)


def test_noise_is_uniform_and_a_pure_function_of_its_keys():
    ids = torch.arange(2000)
    first = noise(ids, 64, seed=3, epoch=5)
    assert torch.equal(first, noise(ids, 64, seed=3, epoch=5))
    # A sample's numbers do not depend on the batch that it is in.
    assert torch.equal(first[[7, 1500]], noise(torch.tensor([7, 1500]), 64, 3, 5))
    histogram = np.histogram(first.numpy(), bins=64, range=(0, 1))[0]
    expected = first.numel() / 64
    chi_square = ((histogram - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    for other in (
        noise(ids, 64, seed=4, epoch=5),
        noise(ids, 64, seed=3, epoch=6),
        noise(ids, 64, seed=3, epoch=5, purpose=1),
        noise(ids + 1, 64, seed=3, epoch=5),
        first.roll(1, dims=1),
    ):
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / first.numel() ** 0.5


ALL_MASKS = BUILT_IN


@given(
    mask=st.sampled_from(ALL_MASKS),
    grid=st.sampled_from([(8, 8), (4, 6), (14, 14), (2, 2), (6, 16)]),
    ratio=st.floats(0.1, 0.9),
    share=st.floats(0, 1),
    epoch=st.integers(0, 5),
    temperature=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    unit=st.sampled_from([1, 2]),
)
def test_every_mask_has_exact_counts(mask, grid, ratio, share, epoch, temperature, unit):
    assume(mask != "uniform" or not any(size // unit % 2 for size in grid))
    count = math.prod(grid)
    num_hidden = masking.num_hidden_patches(count, 0.75 if mask == "uniform" else ratio)
    signal = torch.randn(5, count)
    how = {"num_hard": int(share * num_hidden), "temperature": temperature, "unit": unit}
    visible_ids, hidden_ids = masking.make_mask(
        mask, Draw(3, epoch, torch.arange(5)), grid, num_hidden, signal, **how
    )
    assert visible_ids.shape == (5, count - num_hidden) and hidden_ids.shape == (5, num_hidden)
    both = torch.cat([visible_ids, hidden_ids], 1).sort(dim=1).values
    assert torch.equal(both, torch.arange(count).expand(5, -1))
    # The same sample gets the same mask, whatever stands beside it in the batch.
    again = masking.make_mask(
        mask, Draw(3, epoch, torch.tensor([3])), grid, num_hidden, signal[3:4], **how
    )
    assert torch.equal(again[1][0], hidden_ids[3])


@pytest.mark.parametrize(("mask", "extreme"), [("hardest", "max"), ("easiest", "min")])
def test_hardest_and_easiest(mask, extreme):
    signal = torch.randn(4, 16)
    _, hidden = masking.make_mask(mask, Draw(0, 0, torch.arange(4)), (4, 4), 6, signal, 6)
    largest = extreme == "max"
    expected = signal.topk(6, dim=1, largest=largest).indices.sort(dim=1).values
    assert torch.equal(hidden, expected)


def masks_of(name, grid, num_hidden, count=64, epoch=0):
    draw = Draw(0, epoch, torch.arange(count))
    _, hidden = masking.make_mask(name, draw, grid, num_hidden)
    return masking.to_mask(hidden, math.prod(grid)).view(count, *grid)


@pytest.mark.parametrize(("grid", "num_hidden"), [((14, 14), 147), ((8, 8), 16), ((6, 16), 70)])
def test_a_block_is_one_square(grid, num_hidden):
    """Its bounding box is the smallest square that holds as many patches, within the image."""
    side = 1
    while math.prod(min(side, size) for size in grid) < num_hidden:
        side += 1
    places = set()
    for mask in masks_of("block", grid, num_hidden):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 1


def test_multi_block_hides_whole_blocks():
    """Most hidden patches have hidden neighbours, much more than at random."""

    def neighbours(mask):
        return (mask[:, 1:] & mask[:, :-1]).float().sum() / mask.sum()

    blocks, random = (masks_of(name, (14, 14), 78) for name in ("multi_block", "random"))
    assert neighbours(blocks) > 0.75 > 0.5 > neighbours(random)


def test_uniform_leaves_one_of_each_four():
    masks = masks_of("uniform", (6, 8), 36, count=400)
    cells = (~masks).view(400, 3, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(400, 12, 4)
    assert (cells.sum(2) == 1).all()
    share = cells.float().mean((0, 1))
    assert (share - 0.25).abs().max() < 0.03
    with pytest.raises(ValueError, match="no cells of two"):
        masks_of("uniform", (5, 4), 15)


def test_the_colours_of_noise():
    """Blobs: how often does a hidden patch have a hidden neighbour? Red most, blue least."""
    together = {}
    for colour in ("red", "green", "purple", "blue", "random"):
        masks = masks_of(colour if colour == "random" else f"{colour}_noise", (14, 14), 98)
        together[colour] = (masks[:, 1:] & masks[:, :-1]).float().mean().item()
    assert together["red"] > together["green"] > together["random"] > together["blue"]
    # Over the whole image, no patch is hidden more often than another.
    for colour in ("red", "green", "purple", "blue"):
        share = masks_of(f"{colour}_noise", (6, 6), 18, count=2000).float().mean(0)
        assert (share - 0.5).abs().max() < 0.07, colour


def test_schedules_of_the_hard_share():
    linear = [masking.hard_share(e / 10, 0.1, 0.6) for e in range(1, 11)]
    cosine = [masking.hard_share(e / 10, 0.1, 0.6, "cosine") for e in range(1, 11)]
    assert linear[-1] == cosine[-1] == pytest.approx(0.6)
    assert cosine == sorted(cosine) and cosine[0] < linear[0]
    assert cosine[4] == pytest.approx(linear[4])
    assert {masking.hard_share(e / 10, 0.1, 0.6, "constant") for e in range(1, 11)} == {0.6}
    assert masking.hard_share(1.0, 0.5, 0.0) == 0


@given(st.integers(2, 40), st.floats(0.05, 0.95))
def test_rotating_masks_hide_every_patch(count, ratio):
    num_hidden = max(1, int(count * ratio))
    priority = torch.rand(3, count)
    masks = masking.rotating_masks(priority, num_hidden)
    assert len(masks) == math.ceil(count / num_hidden)
    hidden = torch.stack([masking.to_mask(h, count) for _, h in masks])
    assert hidden.any(0).all() and (hidden.sum(2) == num_hidden).all()


def test_covered_patches_are_visible_ones():
    draw = Draw(0, 0, torch.arange(6))
    visible_ids, _ = masking.make_mask("uniform", draw, (8, 8), 48)
    covered = masking.choose_covered(draw, visible_ids, 0.25, 64)
    assert covered.shape == (6, 4)
    for row in range(6):
        chosen = covered[row].tolist()
        assert len(set(chosen)) == 4 and set(chosen) <= set(visible_ids[row].tolist())

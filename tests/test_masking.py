import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm import masking


def naive_hidden(noise, predicted_loss, num_hidden, num_hard):
    """The sampler as a loop over images and patches."""
    hidden = []
    for row_noise, row_loss in zip(noise.tolist(), predicted_loss.tolist(), strict=True):
        by_loss = sorted(range(len(row_loss)), key=lambda i: -row_loss[i])
        hard = by_loss[:num_hard]
        others = sorted((i for i in range(len(row_loss)) if i not in hard),
                        key=lambda i: -row_noise[i])  # fmt: skip
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
    assert masking.hard_share(0, 200) == pytest.approx(0.5 / 200)
    assert masking.hard_share(99, 200) == pytest.approx(0.25)
    assert masking.hard_share(199, 200) == masking.hard_share(500, 200) == 0.5
    assert masking.hard_share(9, 10, start=0.8, end=0.2) == pytest.approx(0.2)


def test_noise_is_uniform_and_a_pure_function_of_its_keys():
    ids = torch.arange(2000)
    first = masking.noise(ids, 64, seed=3, epoch=5)
    assert torch.equal(first, masking.noise(ids, 64, seed=3, epoch=5))
    # A sample's numbers do not depend on the batch that it is in.
    assert torch.equal(first[[7, 1500]], masking.noise(torch.tensor([7, 1500]), 64, 3, 5))
    histogram = np.histogram(first.numpy(), bins=64, range=(0, 1))[0]
    expected = first.numel() / 64
    chi_square = ((histogram - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    for other in (
        masking.noise(ids, 64, seed=4, epoch=5),
        masking.noise(ids, 64, seed=3, epoch=6),
        masking.noise(ids, 64, seed=3, epoch=5, draw=1),
        masking.noise(ids + 1, 64, seed=3, epoch=5),
        first.roll(1, dims=1),
    ):
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / first.numel() ** 0.5

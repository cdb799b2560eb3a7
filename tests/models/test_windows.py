import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from hpm.models.vit import Attention, VisionTransformer, quarter_ends
from hpm.models.windows import Windows, window_attention


def naive(q, k, v, grid, size, prefix):
    """Each token by itself, in float64."""
    count = q.shape[2]
    places = torch.cartesian_prod(*[torch.arange(side) for side in grid]).reshape(-1, len(grid))
    cells = places // size
    out = torch.empty_like(q)
    for token in range(count):
        seen = list(range(count))
        if token >= prefix:
            same = (cells == cells[token - prefix]).all(1).nonzero()[:, 0] + prefix
            seen = [*range(prefix), *same.tolist()]
        scores = torch.einsum("bhd,bhkd->bhk", q[:, :, token], k[:, :, seen])
        shares = (scores / q.shape[-1] ** 0.5).softmax(-1)
        out[:, :, token] = torch.einsum("bhk,bhkd->bhd", shares, v[:, :, seen])
    return out


@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    size=st.integers(1, 6),
    prefix=st.integers(0, 2),
    batch=st.integers(1, 2),
)
def test_window_attention_equals_a_naive_one(grid, size, prefix, batch):
    tokens = prefix + torch.Size(grid).numel()
    q, k, v = torch.randn(3, batch, 2, tokens, 4).double()
    found = window_attention(q, k, v, Windows(grid, size))
    torch.testing.assert_close(found, naive(q, k, v, grid, size, prefix))
    if size >= max(grid):
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


def test_each_window_is_as_if_the_grid_ended_there():
    """Neither its padding nor other windows change what is inside."""
    attention = Attention(16, 2).double()
    maps = torch.randn(2, 16, 5, 7).double()
    for rows in (slice(0, 4), slice(4, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            others = torch.full_like(maps, 1e6)
            others[:, :, rows, columns] = maps[:, :, rows, columns]
            tokens = others.flatten(2).transpose(1, 2)
            found = attention(tokens, windows=Windows((5, 7), 4))
            alone = attention(maps[:, :, rows, columns].flatten(2).transpose(1, 2))
            found = found.transpose(1, 2).unflatten(2, (5, 7))[:, :, rows, columns]
            torch.testing.assert_close(found.flatten(2).transpose(1, 2), alone)


def test_the_last_block_of_every_quarter_attends_globally():
    assert quarter_ends(12) == [2, 5, 8, 11]
    assert quarter_ends(24) == [5, 11, 17, 23]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_encoder_whose_one_window_holds_all_is_the_global_one(checkpointing):
    encoder = VisionTransformer((64, 96), (16, 16), 3, 32, 8, 2)
    encoder.checkpoint_activations = checkpointing
    images = torch.randn(2, 3, 64, 96)
    plain = encoder(images)
    features, attention = encoder.with_attention(images)
    encoder.window_size = 6
    torch.testing.assert_close(encoder(images), plain)
    torch.testing.assert_close(encoder.with_attention(images), (features, attention))
    encoder.window_size = 2
    assert not torch.allclose(encoder(images), plain)
    torch.testing.assert_close(encoder.with_attention(images)[0], encoder(images))
    [last] = encoder.feature_maps(images, [7])
    tokens = encoder.norm(last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens, encoder(images)[:, 1:])


def test_only_some_blocks_have_windows():
    encoder = VisionTransformer((64, 64), (16, 16), 3, 32, 8, 2, window_size=3)
    block_options = encoder._block_options(torch.zeros(1, 3, 64, 64), None)
    assert [number for number, options in enumerate(block_options) if not options] == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="all patches"):
        encoder(torch.zeros(1, 3, 64, 64), torch.tensor([[0, 1]]))

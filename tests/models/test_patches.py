import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm.models.patches import gather_patches, grid_size, patchify, sincos_positions, unpatchify


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3),
    channels=st.integers(1, 5),
    batch=st.integers(1, 2),
)
def test_unpatchify_inverts_patchify_in_any_number_of_dimensions(shape, channels, batch):
    grid = tuple(g for g, _ in shape)
    patch_size = tuple(p for _, p in shape)
    images = torch.randn(batch, channels, *[g * p for g, p in shape])
    patches = patchify(images, patch_size)
    assert patches.shape == (batch, math.prod(grid), math.prod(patch_size) * channels)
    assert torch.equal(unpatchify(patches, grid, patch_size), images)


def test_order_is_raster_then_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, (2, 3))
    for patch in range(4):
        row, column = divmod(patch, 2)
        cut = images[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(patches[:, patch], cut.permute(0, 2, 3, 1).flatten(1))


def test_an_image_is_a_video_of_one_frame():
    images = torch.randn(2, 3, 8, 12)
    tubes = patchify(images[:, :, None], (1, 4, 4))
    assert torch.equal(tubes, patchify(images, (4, 4)))


def test_positions_equal_a_naive_loop():
    dim, grid = 16, (3, 5)
    ours = sincos_positions(grid, dim)
    assert (ours[0] == 0).all()
    for row in range(3):
        for column in range(5):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = ours[1 + row * 5 + column]
            torch.testing.assert_close(found, torch.tensor(expected))


def test_gather_patches():
    values, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    expected = torch.stack([values[0, [4, 0]], values[1, [1, 1]]])
    assert torch.equal(gather_patches(values, ids), expected)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="does not divide"):
        grid_size((224, 225), (16, 16))
    with pytest.raises(ValueError, match="differ in length"):
        grid_size((224, 224), (16,))
    for dim in (2, 7):
        with pytest.raises(ValueError, match="cannot be shared"):
            sincos_positions((2, 2), dim)

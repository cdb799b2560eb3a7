import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm.data import demo


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, demo.SIZES["test"] - 1), size=st.sampled_from([32, 64, 96]))
def test_an_image_and_what_is_known_of_it(index, size):
    drawn = demo.render(index, "test", size)
    assert drawn.image.shape == (size, size, 3) and drawn.image.dtype == np.uint8
    assert drawn.mask.shape == (size, size) and drawn.mask.dtype == bool
    assert drawn.label == index % 10
    assert 0.05 < drawn.mask.mean() < 0.45
    # Boxes are tight: their union's hull is the mask's, and each edge touches the mask.
    for x0, y0, x1, y1 in drawn.boxes:
        inside = drawn.mask[y0:y1, x0:x1]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    covered = np.zeros_like(drawn.mask)
    for x0, y0, x1, y1 in drawn.boxes:
        covered[y0:y1, x0:x1] = True
    assert not (drawn.mask & ~covered).any()


def test_the_same_in_another_process():
    code = (
        "import hashlib; from hpm.data import demo; "
        "print(hashlib.sha256(demo.render(123, 'train').image.tobytes()).hexdigest())"
    )
    prints = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(prints) == 1
    assert np.array_equal(demo.render(123).image, demo.render(123).image)
    assert not np.array_equal(demo.render(123).image, demo.render(133).image)
    assert not np.array_equal(demo.render(123).image, demo.render(123, "test").image)


def test_the_scene_is_the_same_at_every_size():
    for index in range(20):
        large = demo.render(index, size=128).mask
        shrunk = large.reshape(64, 2, 64, 2).mean((1, 3)) >= 0.5
        assert (shrunk != demo.render(index, size=64).mask).mean() < 0.02


def test_object_patches_are_harder_to_guess_from_their_neighbours():
    """Error of guessing an 8x8 patch from the mean of the patches around it."""
    errors, on_object = [], []
    for index in range(100):
        drawn = demo.render(index)
        cut = drawn.image.reshape(8, 8, 8, 8, 3).astype(float)
        error = (cut - cut.mean((1, 3), keepdims=True)).std((1, 3)).mean(-1)
        errors.append(error.ravel())
        on_object.append(drawn.mask.reshape(8, 8, 8, 8).mean((1, 3)).ravel() >= 0.5)
    errors, on_object = np.concatenate(errors), np.concatenate(on_object)
    pairs = errors[on_object][:, None] > errors[~on_object][None]
    assert pairs.mean() > 0.9


def test_out_of_range():
    with pytest.raises(IndexError, match="4096"):
        demo.render(4096)
    with pytest.raises(ValueError, match="train, test"):
        demo.render(0, "val")

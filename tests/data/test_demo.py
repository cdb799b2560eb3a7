import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm.data import demo

INDEX = st.integers(0, demo.SIZES["test"] - 1)


def patches(image):
    """[64 64 ...] -> [8 8 64 ...]: rows and columns of patches of 8x8 pixels."""
    cut = image.reshape(8, 8, 8, 8, *image.shape[2:]).swapaxes(1, 2)
    return cut.reshape(8, 8, 64, *image.shape[2:])


def interpolation_error(image):
    """Mean squared error [8 8] of each patch, guessed from the means of the eight around it.

    The guess is the plane through those means; at the border, what is missing is mirrored.
    """
    cut = patches(image / 255)
    around = np.pad(cut.mean(2), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = {(i, j): around[1 + i : 9 + i, 1 + j : 9 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)}
    del shifted[0, 0]
    level = sum(shifted.values()) / 8
    down = sum(i * mean for (i, _), mean in shifted.items()) / 6
    right = sum(j * mean for (_, j), mean in shifted.items()) / 6
    y, x = (np.mgrid[0:8, 0:8].reshape(2, 64, 1) - 3.5) / 8
    guess = level[:, :, None] + down[:, :, None] * y + right[:, :, None] * x
    return ((cut - guess) ** 2).mean((2, 3))


@settings(max_examples=30, deadline=None)
@given(index=INDEX, size=st.sampled_from([32, 64, 96]))
def test_an_image_and_what_is_known_of_it(index, size):
    drawn = demo.render(index, "test", size)
    assert drawn.image.shape == (size, size, 3) and drawn.image.dtype == np.uint8
    assert drawn.mask.shape == (size, size) and drawn.mask.dtype == bool
    assert drawn.label == index % 10
    assert 0.13 < drawn.mask.mean() < 0.36
    assert drawn.boxes.shape in {(1, 4), (2, 4)} and drawn.boxes.dtype.kind == "i"


@settings(max_examples=30, deadline=None)
@given(index=INDEX, size=st.sampled_from([32, 64, 96]))
def test_boxes_are_tight_around_the_mask(index, size):
    drawn = demo.render(index, "test", size)
    covered = np.zeros_like(drawn.mask)
    for x0, y0, x1, y1 in drawn.boxes:
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
        inside = drawn.mask[y0:y1, x0:x1]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        covered[y0:y1, x0:x1] = True
    assert not (drawn.mask & ~covered).any()


def test_the_same_in_another_process():
    code = (
        "import hashlib; from hpm.data import demo; "
        "print(hashlib.sha256(demo.render(123, 'train').image.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    here = hashlib.sha256(demo.render(123).image.tobytes()).hexdigest()
    assert there.decode().strip() == here
    assert np.array_equal(demo.render(123).image, demo.render(123).image)


def test_every_index_and_split_has_its_own_image():
    images = [demo.render(i, split).image.tobytes() for split in demo.SIZES for i in range(100)]
    assert len(set(images)) == len(images)


def test_classes_are_ten_balanced_and_of_one_size():
    assert len(set(demo.CLASSES)) == len(demo.SHAPES_AND_TEXTURES) == 10
    drawn = [demo.render(i) for i in range(1000)]
    labels = np.array([d.label for d in drawn])
    assert (np.bincount(labels) == 100).all()
    # The share of the image that is object does not tell the class.
    share = np.array([d.mask.mean() for d in drawn])
    assert np.ptp([share[labels == c].mean() for c in range(10)]) < 0.03


@pytest.mark.parametrize("label", range(10))
def test_a_shape_lies_in_the_unit_disc_and_covers_half_of_it(label):
    shape, _ = demo.SHAPES_AND_TEXTURES[label]
    v, u = np.mgrid[-1.5:1.5:300j, -1.5:1.5:300j].astype(np.float32)
    inside = shape(u, v)
    assert np.hypot(u, v)[inside].max() <= 1.01
    assert inside.mean() * 9 > np.pi / 2


def test_the_scene_is_the_same_at_every_size():
    for index in range(20):
        small, large = demo.render(index, size=32), demo.render(index, size=64)
        shrunk = large.mask.reshape(32, 2, 32, 2).mean((1, 3)) >= 0.5
        assert (shrunk != small.mask).mean() < 0.03
        pixels = large.image.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert abs(pixels - small.image).mean() < 8


def test_object_patches_are_harder_to_guess_from_their_neighbours():
    drawn = [demo.render(index) for index in range(100)]
    errors = np.array([interpolation_error(d.image) for d in drawn])
    on_object = np.array([patches(d.mask).mean(2) >= 0.5 for d in drawn])
    hard, easy = errors[on_object], errors[~on_object]
    assert (hard[:, None] > easy[None]).mean() > 0.95  # the area under the ROC curve
    # And yet there is something to guess in a background: it is not one colour.
    untouched = np.array([patches(d.mask).sum(2) == 0 for d in drawn])
    assert np.median(errors[untouched]) > 1e-5


def test_out_of_range():
    for index in (-1, 4096):
        with pytest.raises(IndexError, match="4096"):
            demo.render(index)
    with pytest.raises(ValueError, match="train, test"):
        demo.render(0, "val")

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hpm.data.arrays import UnreadableImage
from hpm.data.transforms import evaluation_view, random_crop, training_view


@given(
    width=st.integers(1, 500), height=st.integers(1, 500), low=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_crops_lie_within_the_image(width, height, low, seed):
    left, top, right, bottom = random_crop(np.random.default_rng(seed), width, height, (low, 1))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_area_and_shape_of_crops():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop(rng, 400, 300, (0.2, 1)) for _ in range(500)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = widths * heights / (400 * 300)
    assert 0.19 < areas.min() < 0.25 and areas.max() <= 1
    assert (widths / heights).min() > 0.7 and (widths / heights).max() < 1.4


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("stored", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_the_wanted_channels(channels, mode, stored):
    image = Image.new("RGB", (30, 20), (200, 100, 50)).convert(stored)
    for view in (
        evaluation_view(image, (8, 12), channels),
        training_view(image, (8, 12), channels, np.random.default_rng(0))[0],
    ):
        assert view.shape == (channels, 8, 12) and view.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_not_clipped(channels):
    pixels = np.full((8, 8), 32768, dtype=np.uint16)
    view = evaluation_view(Image.fromarray(pixels), (8, 8), channels)
    assert view == pytest.approx(np.full((channels, 8, 8), 32768 / 257))


@given(
    width=st.integers(1, 60), height=st.integers(1, 60), size=st.tuples(*[st.integers(1, 40)] * 2)
)  # fmt: skip
def test_the_evaluation_view_is_that_of_pillow(width, height, size):
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(0, 256, (height, width), np.uint8))
    expected = np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(evaluation_view(image, size, 1)[0], expected)


def test_flip_and_determinism():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    whole = (1.0, 1.0)
    views = [
        training_view(image, (8, 8), 1, np.random.default_rng(s), whole, flip=True)[0]
        for s in [*range(20), *range(20)]
    ]
    for first, again in zip(views[:20], views[20:], strict=True):
        assert np.array_equal(first, again)
    unflipped = [
        training_view(image, (8, 8), 1, np.random.default_rng(s), whole, flip=False)[0]
        for s in range(20)
    ]
    mirrored = sum(
        np.array_equal(v[..., ::-1], u) for v, u in zip(views[:20], unflipped, strict=True)
    )
    assert 3 <= mirrored <= 17


def test_flips():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    upright = np.asarray(image)
    ways = {
        "none": [upright],
        "horizontal": [upright, upright[:, ::-1]],
        "vertical": [upright, upright[::-1]],
        "both": [upright, upright[:, ::-1], upright[::-1], upright[::-1, ::-1]],
    }

    def views(flip):
        rngs = map(np.random.default_rng, range(40))
        return [training_view(image, (8, 8), 1, rng, (1.0, 1.0), flip)[0] for rng in rngs]

    for flip, expected in ways.items():
        found = {view.tobytes() for view in views(flip)}
        assert found == {np.ascontiguousarray(way).tobytes() for way in expected}
    assert np.array_equal(views(True), views("horizontal"))
    assert np.array_equal(views(False), views("none"))


def test_exif_orientation_is_heeded():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 3  # turned by half
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif, quality=95)
    view = evaluation_view(Image.open(file), (20, 40), 3)
    assert view[0, 10, 5] < 60 and view[0, 10, 35] > 200


def test_large_jpegs_are_not_decoded_whole():
    file = io.BytesIO()
    Image.new("RGB", (1600, 1600)).save(file, "jpeg")
    image = Image.open(file)
    evaluation_view(image, (100, 100), 3)
    assert image.size == (200, 200)


def test_broken_and_tiny_images():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "jpeg")
    broken = Image.open(io.BytesIO(file.getvalue()[:-300]))
    with pytest.raises(UnreadableImage):
        evaluation_view(broken, (8, 8), 3)
    with pytest.raises(UnreadableImage, match="3x9 pixels, smaller than a patch of 4"):
        evaluation_view(Image.new("RGB", (3, 9)), (8, 8), 3, min_side=4)


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical", "both"])
def test_a_training_view_says_where_in_its_image_it_lies(flip):
    """An image whose pixels are their own coordinates shows it."""
    rows, columns = np.meshgrid(np.linspace(0, 1, 80), np.linspace(0, 1, 120), indexing="ij")
    pixels = np.stack([rows, columns, rows * 0]) * 255
    image = Image.fromarray(pixels.round().astype(np.uint8).transpose(1, 2, 0))
    seen = set()
    for seed in range(20):
        view, crop = training_view(image, (40, 40), 3, np.random.default_rng(seed), flip=flip)
        top, bottom, left, right = crop
        for channel, axis, (start, end) in [(0, 0, (top, bottom)), (1, 1, (left, right))]:
            line = view[channel].mean(1 - axis) / 255
            expected = start + (end - start) * (np.arange(40) + 0.5) / 40
            np.testing.assert_allclose(line, expected, atol=0.02)
        seen.add((top > bottom, left > right))
    assert len(seen) == {"none": 1, "horizontal": 2, "vertical": 2, "both": 4}[flip]

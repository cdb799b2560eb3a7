import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hpm.data import jpeg
from hpm.data.arrays import Pixels, UnreadableImage
from hpm.data.opening import open_image
from hpm.data.transforms import centred_box, decode, evaluation_view, random_crop, training_view


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    low=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
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
        training_view(decode(image, channels), (8, 12), np.random.default_rng(0))[0],
    ):
        assert view.shape == (channels, 8, 12) and view.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_not_clipped(channels):
    pixels = np.full((8, 8), 32768, dtype=np.uint16)
    view = evaluation_view(Image.fromarray(pixels), (8, 8), channels)
    assert view == pytest.approx(np.full((channels, 8, 8), 32768 / 257))


@given(
    width=st.integers(1, 60), height=st.integers(1, 60), size=st.tuples(*[st.integers(1, 40)] * 2)
)
def test_the_evaluation_view_is_that_of_pillow(width, height, size):
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(64, 192, (height, width, 3), np.uint8))
    part = image.crop(centred_box(width, height, size))
    expected = np.asarray(part.resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    # Both round twice, after the rows and after the columns, but not always in the same order.
    assert abs(evaluation_view(image, size, 3).astype(int) - expected).max() <= 2


@given(
    width=st.integers(1, 60), height=st.integers(1, 60), size=st.tuples(*[st.integers(1, 40)] * 2)
)
def test_the_centred_box_is_the_largest_of_the_shape(width, height, size):
    left, top, right, bottom = centred_box(width, height, size)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert right - left == width or bottom - top == height
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    if size[0] == size[1]:
        assert right - left == bottom - top


def test_flip_and_determinism():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    whole = (1.0, 1.0)
    views = [
        training_view(decode(image, 1), (8, 8), np.random.default_rng(s), whole, flip=True)[0]
        for s in [*range(20), *range(20)]
    ]
    for first, again in zip(views[:20], views[20:], strict=True):
        assert np.array_equal(first, again)
    unflipped = [
        training_view(decode(image, 1), (8, 8), np.random.default_rng(s), whole, flip=False)[0]
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
        return [training_view(decode(image, 1), (8, 8), rng, (1.0, 1.0), flip)[0] for rng in rngs]

    for flip, expected in ways.items():
        found = {view.tobytes() for view in views(flip)}
        assert found == {np.ascontiguousarray(way).tobytes() for way in expected}
    assert np.array_equal(views(True), views("horizontal"))
    assert np.array_equal(views(False), views("none"))


def photograph(width=61, height=40, mode="RGB", orientation=None, **options):
    """A JPEG file in memory."""
    rng = np.random.default_rng(width)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height))
    exif = picture.getexif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    picture.convert(mode).save(file, "jpeg", exif=exif, **options)
    return file


def by_pillow(monkeypatch, file, channels, least=None):
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        return decode(open_image(file), channels, least).array


JPEGS = {
    "plain": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "RGB": {"keep_rgb": True},
    **{f"orientation {number}": {"orientation": number} for number in range(1, 9)},
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_both_decoders_give_the_same_pixels(options, channels, monkeypatch):
    file = photograph(**options)
    expected = by_pillow(monkeypatch, file, channels)
    assert np.array_equal(decode(open_image(file), channels).array, expected)
    upright = ImageOps.exif_transpose(Image.open(file))
    assert expected.shape == (channels, upright.height, upright.width)


@pytest.mark.parametrize(
    ("least", "scale"), [((100, 100), 1), ((99, 90), 2), ((30, 40), 4), ((1, 1), 8)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_large_jpegs_are_not_decoded_whole(least, scale, channels, monkeypatch):
    file = photograph(203, 199)
    expected = by_pillow(monkeypatch, file, channels, least)
    found = decode(open_image(file), channels, least).array
    assert np.array_equal(found, expected)
    assert found.shape == (channels, -(-199 // scale), -(-203 // scale))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_are_not_decoded_too_small(orientation, monkeypatch):
    """`least` is of the upright image, whose sides are exchanged in half of the orientations."""
    file = photograph(800, 200, orientation=orientation)
    upright = (200, 800) if orientation < 5 else (800, 200)
    least = tuple(side // 2 for side in upright)
    found = decode(open_image(file), 3, least).array
    assert found.shape[1:] == least
    assert np.array_equal(found, by_pillow(monkeypatch, file, 3, least))


def test_the_fast_decoder_is_used(monkeypatch):
    image = open_image(photograph())
    monkeypatch.setattr(Image.Image, "convert", None)
    assert decode(image, 3).array.shape == (3, 40, 61)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_heeded(orientation):
    file = photograph(60, 40, orientation=orientation, quality=95)
    expected = ImageOps.exif_transpose(Image.open(file)).resize((30, 30), 3, box=(0, 0, 40, 40))
    whole = decode(open_image(file), 3)
    view = whole.resized((30, 30), (0, 0, 40, 40)).astype(int)
    differences = abs(view - np.asarray(expected).transpose(2, 0, 1))
    # Pillow's box looks beyond its edges.
    assert differences[:, :-3, :-3].max() <= 3


@pytest.mark.parametrize("missing", [1, 2, 20, 300])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "CMYK"}])
def test_truncated_files_are_unreadable(missing, options):
    file = photograph(64, 64, **options)
    broken = open_image(io.BytesIO(file.getvalue()[:-missing]))
    with pytest.raises(UnreadableImage):
        evaluation_view(broken, (8, 8), 3)


def test_what_only_pillow_reads_stays_readable(monkeypatch):
    """Stray bytes before a marker: libjpeg warns, the pixels are whole."""
    content = photograph().getvalue()
    at = content.index(b"\xff\xda")
    file = io.BytesIO(content[:at] + b"\0\0" + content[at:])
    assert decode(open_image(file), 3).array.shape == (3, 40, 61)


def test_wrongly_named_files(tmp_path):
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "a.jpg", "png")
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "b.png", "jpeg")
    for file in tmp_path.iterdir():
        assert abs(evaluation_view(open_image(file), (9, 9), 3)[0].astype(int) - 200).max() <= 2


def test_tiny_images():
    with pytest.raises(UnreadableImage, match="3x9 pixels, smaller than a patch of 4"):
        evaluation_view(Image.new("RGB", (3, 9)), (8, 8), 3, min_side=4)


@given(
    channels=st.integers(1, 6),
    dtype=st.sampled_from(["u1", "f4"]),
    size=st.tuples(*[st.integers(1, 40)] * 2),
    seed=st.integers(0, 99),
)
def test_the_order_in_memory_does_not_change_a_view(channels, dtype, size, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (channels, 30, 20)).astype(dtype)
    box = random_crop(rng, 20, 30, (0.2, 1.0))
    ways = [
        pixels,
        pixels[:, ::-1].copy()[:, ::-1],
        pixels.transpose(1, 2, 0).copy().transpose(2, 0, 1),
    ]
    first, *others = (Pixels(way, channels).resized(size, box) for way in ways)
    assert first.shape == (channels, *size) and all(np.array_equal(first, o) for o in others)


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical", "both"])
def test_a_training_view_says_where_in_its_image_it_lies(flip):
    """An image whose pixels are their own coordinates shows it."""
    rows, columns = np.meshgrid(np.linspace(0, 1, 80), np.linspace(0, 1, 120), indexing="ij")
    pixels = np.stack([rows, columns, rows * 0]) * 255
    image = Image.fromarray(pixels.round().astype(np.uint8).transpose(1, 2, 0))
    seen = set()
    for seed in range(20):
        view, crop = training_view(
            decode(image, 3), (40, 40), np.random.default_rng(seed), flip=flip
        )
        top, bottom, left, right = crop
        for channel, axis, (start, end) in [(0, 0, (top, bottom)), (1, 1, (left, right))]:
            line = view[channel].mean(1 - axis) / 255
            expected = start + (end - start) * (np.arange(40) + 0.5) / 40
            np.testing.assert_allclose(line, expected, atol=0.02)
        seen.add((top > bottom, left > right))
    assert len(seen) == {"none": 1, "horizontal": 2, "vertical": 2, "both": 4}[flip]


@pytest.mark.parametrize("shape", [(300, 400), (401, 300), (257, 256), (60, 31), (256, 256)])
@pytest.mark.parametrize(("size", "share"), [((224, 224), 0.875), ((96, 96), 0.9), ((48, 96), 0.5)])
def test_a_part_of_the_centre_is_what_torchvision_cuts_out(shape, size, share):
    """Resize(size / 0.875), CenterCrop(size), as in the published recipes."""
    from hpm.core.extras import need

    v2 = need("torchvision.transforms.v2", "timm", "the test")
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(small).resize(shape[::-1])
    view = evaluation_view(image, size, 3, crop_share=share)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    sides = [int(side / share) for side in size]
    if size[0] == size[1]:
        sides = sides[:1]
    else:  # which torchvision's Resize has no word for
        scale = max(sides[0] / shape[0], sides[1] / shape[1])
        sides = [int(scale * side + 1e-9) for side in shape]
    resized = v2.Resize(sides, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)(pixels)
    expected = v2.CenterCrop(size)(resized).numpy()
    assert view.shape == expected.shape
    assert abs(view.astype(int) - expected).max() <= 1


def test_all_of_the_centre_is_the_view_as_it_always_was():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
    pixels = decode(image, 3)
    expected = pixels.resized((32, 32), centred_box(70, 50, (32, 32)))
    assert np.array_equal(evaluation_view(image, (32, 32), 3, crop_share=1.0), expected)


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    share=st.floats(0.1, 1),
    size=st.tuples(*[st.integers(1, 40)] * 2),
)
def test_a_view_has_its_size_whatever_the_share(width, height, share, size):
    image = Image.fromarray(np.full((height, width, 3), 77, np.uint8))
    view = evaluation_view(image, size, 3, crop_share=share)
    assert view.shape == (3, *size) and (view == 77).all()


def test_a_very_long_image_does_not_fill_the_memory():
    from hpm.data.transforms import resized_size

    assert resized_size((1, 1_000_000), (224, 224), 0.875) == (256, 256_000_000)
    assert evaluation_view(Image.new("L", (60_000, 1)), (224, 224), 1, crop_share=0.875).size

"""What may be passed to an encoder, and that each of it means one thing."""

import numpy as np
import pytest
import torch
from helpers import architecture_of
from PIL import Image

import hpm
from hpm.data.loader import IMAGENET_MEAN, IMAGENET_STD, evaluation_batches
from hpm.data.sources import open_source
from hpm.models.build import build_encoder
from hpm.weights.backbone import Backbone

SHAPE = {
    "image_size": (16, 16),
    "patch_size": (4, 4),
    "channels": 3,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}


def backbone(**changes):
    architecture = SHAPE | changes
    channels = architecture["channels"]
    moments = (
        (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.5] * channels, [0.2] * channels)
    )
    return Backbone(build_encoder(architecture_of(architecture), 0), *moments).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An oblong photograph as JPEG, one upside down by EXIF, grey and palette ones."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (5, 9, 3), np.uint8)).resize((70, 41))
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(folder / "a.jpg", quality=95)
    smooth.save(folder / "b.png", exif=exif)
    smooth.convert("L").save(folder / "c.png")
    smooth.quantize(16).save(folder / "d.png")
    smooth.convert("RGBA").save(folder / "e.png")
    return folder


def test_preprocess_is_the_view_of_an_evaluation(photos):
    encoder = backbone()
    source = open_source(str(photos)).train
    (batch,) = evaluation_batches(source, (16, 16), 3, 8)
    expected = encoder.normalize(batch.images)
    paths = [source.path(i) for i in range(len(source))]
    assert torch.equal(encoder.preprocess(paths), expected)
    assert torch.equal(encoder.preprocess(paths[1]), expected[1:2])
    for number in range(1, len(paths)):  # a JPEG is reduced as it is decoded, an open image is not
        with Image.open(paths[number]) as picture:
            assert torch.equal(encoder.preprocess(picture), expected[number : number + 1])
    with torch.no_grad():
        assert torch.equal(encoder(batch.images)[1], encoder(encoder.preprocess(paths))[1])


def test_preprocess_takes_arrays_and_leaves_images_as_they_are(photos):
    encoder = backbone()
    picture = Image.open(photos / "a.jpg")
    first = encoder.preprocess(picture)
    assert picture.size == (70, 41) and picture.mode == "RGB"
    array = np.asarray(picture)
    both = encoder.preprocess([array, array.astype(np.uint16) * 257])
    assert both.dtype == torch.float32 and both.shape == (2, 3, 16, 16)
    assert torch.equal(both[:1], first)
    torch.testing.assert_close(both[1:], first, rtol=0, atol=0.02)
    grey = np.asarray(picture.convert("L"))
    assert torch.equal(encoder.preprocess(grey), encoder.preprocess(grey[..., None]))
    many = np.zeros((20, 30, 7), np.uint8)
    assert backbone(channels=7).preprocess(many).shape == (1, 7, 16, 16)


def test_preprocess_says_what_is_wrong(tmp_path):
    encoder = backbone()
    (tmp_path / "broken.png").write_bytes(b"no image")
    chw = np.zeros((3, 20, 30), np.uint8)
    for wrong, message in (
        (tmp_path / "broken.png", "broken.png cannot be used: cannot identify"),
        (tmp_path / "none.png", "none.png cannot be used"),
        (chw, r"picture 0 cannot be used: 30 channels instead of 3; arrays are \[H W C\]"),
        ([chw.transpose(1, 2, 0), chw[None]], "picture 1 cannot be used: 1x3x20x30 values"),
        (np.zeros((20, 20, 3)), "it is float64, not uint8 or uint16"),
        (torch.zeros(3, 20, 20), "got torch.Tensor; encoder.normalize"),
        ([], "no pictures"),
    ):
        with pytest.raises(hpm.UserError, match=message) as caught:
            encoder.preprocess(wrong)
        assert "\n" not in str(caught.value)


def test_floating_point_means_normalised():
    encoder = backbone()
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder(pixels)
        normalised = encoder.normalize(pixels)
        for images in (
            normalised,
            normalised.double(),
            encoder.normalize(pixels / 255, full_scale=1),
            encoder.normalize(pixels.float()),
            encoder.normalize(pixels.to(torch.uint16) * 257),
            pixels.to(torch.uint16) * 257,
        ):
            torch.testing.assert_close(encoder(images)[0], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder(normalised.half())[0], expected[0], rtol=0.02, atol=0.02)
    for wrong, scale in ((pixels / 255, 1), (pixels.float(), 255), (pixels.half(), 255)):
        with pytest.raises(
            hpm.UserError, match=rf"encoder.normalize\(images, full_scale={scale}\)"
        ):
            encoder(wrong)


@pytest.mark.parametrize("level", [0, 100, 124, 150, 180, 255])
def test_an_image_of_one_brightness_is_no_mistake(level):
    """Normalised, a bright one has no value below 0 either."""
    encoder = backbone()
    blank = np.full((20, 20, 3), level, np.uint8)
    with torch.no_grad():
        assert encoder(encoder.preprocess(blank))[0].isfinite().all()


def with_moments(mean, std):
    return Backbone(build_encoder(architecture_of(SHAPE), 0), [mean] * 3, [std] * 3).eval()


MOMENTS = [(0.5, 0.5), (0.0, 1.0), (0.45, 0.25), (0.2, 0.2)]


@pytest.mark.parametrize(("mean", "std"), MOMENTS)
def test_bright_images_are_no_mistake(mean, std):
    """Normalised, they are within [0, 1], as pixels may be."""
    encoder = with_moments(mean, std)
    levels = 255 * torch.tensor([mean, mean + 0.95 * std])
    first, last = levels.ceil().int().tolist()
    ramp = np.linspace(first, last, 16).astype(np.uint8)
    images = encoder.preprocess(np.broadcast_to(ramp[:, None], (16, 16, 3)))
    assert 0 <= images.min() < 0.1 and 0.75 < images.max() <= 1
    for same in (images, images.half(), images.double()):
        assert encoder(same)[0].isfinite().all()


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0)])
def test_deep_images_are_no_mistake(mean, std):
    """White is normalised to 1: nothing tells these from pixels."""
    encoder = with_moments(mean, std)
    levels = np.random.default_rng(0).integers(65536 * mean, 65536, (1, 3, 16, 16))
    images = encoder.normalize(torch.from_numpy(levels.astype(np.uint16)))
    assert 0 <= images.min() < 0.1 and 0.75 < images.max() <= 1
    assert encoder(images)[0].isfinite().all()


@pytest.mark.parametrize(("mean", "std"), [pair for pair in MOMENTS if pair != (0.0, 1.0)])
def test_pixels_are_told_from_bright_images(mean, std):
    """By their levels, if white is normalised to 1."""
    encoder = with_moments(mean, std)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    for wrong in (pixels / 255, (pixels / 255).half()):
        with pytest.raises(hpm.UserError, match="full_scale=1"):
            encoder(wrong)


def test_data_in_units_of_its_own_is_not_doubted():
    encoder = Backbone(build_encoder(architecture_of(SHAPE), 0), [280.0] * 3, [10.0] * 3)
    warm = encoder.normalize(torch.full((1, 3, 16, 16), 300.0) + torch.rand(1, 3, 16, 16), 1)
    assert warm.min() > 1.5 and encoder(warm)[0].isfinite().all()


def test_other_images_are_one_clear_line():
    encoder = backbone()
    for wrong, message in (
        (torch.randn(2, 1, 16, 16), r"\[2, 1, 16, 16\], but this encoder takes \[B 3 16 16\]$"),
        (torch.randn(3, 16, 16), r"takes \[B 3 16 16\], one image as images\[None\]"),
        (torch.randn(2, 16, 16, 3), r"takes \[B 3 16 16\]$"),
        (torch.randn(2, 3, 24, 16), r"24 x 16 pixels.*16 x 16.*image_size=\(24, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "images are int64: pass uint8"),
        (np.zeros((2, 3, 16, 16), np.uint8), "numpy.ndarray.*encoder.preprocess"),
        ("photo.jpg", "of type str.*encoder.preprocess"),
    ):
        with pytest.raises(hpm.UserError, match=message) as caught:
            encoder(wrong)
        assert "\n" not in str(caught.value)


def test_half_precision_weights():
    encoder = backbone().bfloat16()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        pooled, patches = encoder(pixels)
    assert pooled.dtype == patches.dtype == torch.bfloat16


def test_another_image_size(finished_run):
    same = hpm.load_encoder(finished_run.folder, image_size=16)
    larger = hpm.load_encoder(finished_run.folder, image_size=(24, 32))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = hpm.load_encoder(finished_run.folder)(pixels)[1]
        assert torch.equal(same(pixels)[1], expected)
        enlarged = torch.zeros(2, 3, 24, 32, dtype=torch.uint8)
        assert larger(enlarged)[1].shape == (2, 6 * 8, expected.shape[-1])
    assert not larger.training
    with pytest.raises(hpm.UserError, match="image_size 18 is not a multiple.*nearest.* is 16"):
        hpm.load_encoder(finished_run.folder, image_size=18)

"""Many channels, 16 bits, floating point: the same views as of pictures, nothing lost."""

import io
import sys
from contextlib import suppress

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hpm
from hpm.data.arrays import UnreadableImage
from hpm.data.loader import (
    EvaluationViews,
    TrainingViews,
    Views,
    evaluation_batches,
    normalize,
    training_loader,
)
from hpm.data.opening import open_image
from hpm.data.sources import FileSource, Subset, open_source
from hpm.data.statistics import measure_statistics
from hpm.data.transforms import decode, evaluation_view, training_view
from hpm.show.command import show
from hpm.show.options import ShowConfig
from hpm.weights.resolve import load

RNG = np.random.default_rng(0)
WHOLE = EvaluationViews((20, 24), 7)


def pixels(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file


def png(array):
    return io.BytesIO(imagecodecs.png_encode(array))


def view_of(file, size, channels):
    return evaluation_view(open_image(file), size, channels)


sides = st.integers(5, 60)


@settings(deadline=None, max_examples=40)
@given(height=sides, width=sides, out_height=sides, out_width=sides, seed=st.integers(0, 99))
def test_one_picture_given_in_all_ways_gives_one_view(height, width, out_height, out_width, seed):
    """PNG and .npy, in 8 bits, 16 bits and floating point: the same crop, within rounding."""
    picture = np.random.default_rng(seed).integers(64, 192, (height, width, 3)).astype(np.uint8)
    size = (out_height, out_width)
    deep = picture.astype(np.uint16) * 257
    exact = [Image.fromarray(picture), open_image(npy(picture))]
    near = [open_image(f) for f in (png(deep), tiff(deep), npy((picture / 255).astype("f8")))]
    for make in (
        lambda image: evaluation_view(image, size, 3),
        lambda image: training_view(
            decode(image, 3), size, np.random.default_rng(seed), (0.2, 1.0)
        )[0],
    ):
        # Pillow rounds 8 bits twice, after the rows and after the columns, in an order that depends
        # on the size of the image, of which arrays show it the part around the crop.
        expected, same = map(make, exact)
        assert same.dtype == np.uint8 and abs(expected.astype(int) - same).max() <= 2
        for image in near:
            view = make(image)
            assert view.dtype == np.float32 and view.shape == expected.shape
            assert abs(view - expected).max() < 1.6


@pytest.mark.parametrize("channels", [2, 5, 7, 12, 32])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_layout_of_many_channels(channels, dtype):
    image = pixels(channels, 20, 24, dtype=dtype)
    contiguous = image.transpose(1, 2, 0)
    expected = image if dtype == np.uint8 else (image / 257).astype(np.float32)
    files = [
        npy(image),
        npy(contiguous),
        npy(np.asfortranarray(contiguous)),
        tiff(image, photometric="minisblack", planarconfig="separate"),
        tiff(image, photometric="minisblack"),  # a page each
        tiff(contiguous, photometric="minisblack", planarconfig="contig", compression="zlib"),
        tiff(contiguous, photometric="minisblack", planarconfig="contig", compression="lzw"),
        tiff(image, photometric="minisblack", compression="lzw"),
        tiff(image, imagej=True, metadata={"axes": "CYX"}),
    ]
    for file in files:
        np.testing.assert_allclose(view_of(file, (20, 24), channels), expected, rtol=1e-6)


def test_mapped_files_are_read_as_held_ones(tmp_path):
    big = pixels(300, 400, 7)
    np.save(tmp_path / "big.npy", big)
    for seed in range(5):
        views = [
            training_view(
                decode(open_image(f), 7), (32, 32), np.random.default_rng(seed), (0.05, 0.3)
            )[0]
            for f in (tmp_path / "big.npy", npy(big))
        ]
        assert np.array_equal(*views)


def test_full_scale_of_each_type():
    for array, expected in (
        (np.full((8, 8), True), 255),
        (np.full((8, 8), 32768, np.uint16), 32768 / 257),
        (np.full((8, 8), 32768, ">u2"), 32768 / 257),
        (np.full((8, 8), -1000, np.int16), -255000),
        (np.full((8, 8), 0.25, np.float16), 63.75),
        (np.full((8, 8), 290.0), 73950),
    ):
        view = view_of(npy(array), (4, 4), 1)
        assert view == pytest.approx(np.full((1, 4, 4), expected), rel=1e-6)
    grey = np.full((8, 8), 32769, np.uint16)
    for file in (png(grey), tiff(grey), tiff(grey.astype("f4") / 65535), npy(grey)):
        assert view_of(file, (8, 8), 1) == pytest.approx(np.full((1, 8, 8), 32769 / 257), rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stored", [1, 2, 3, 4])
def test_16_bit_colours_are_converted_as_8_bit_ones(stored, channels):
    picture = pixels(9, 9, stored) if stored > 1 else pixels(9, 9)
    if stored in (2, 4):
        picture[..., -1] = 255
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[stored]
    expected = evaluation_view(Image.fromarray(picture, mode), (9, 9), channels)
    deep = picture.astype(np.uint16) * 257
    view = view_of(png(deep), (9, 9), channels)
    assert view.dtype == np.float32 and abs(view - expected).max() <= 0.51
    if stored in (3, 4):
        alpha = {"extrasamples": ["unassalpha"]} if stored == 4 else {}
        assert np.array_equal(
            view_of(tiff(deep, photometric="rgb", **alpha), (9, 9), channels), view
        )


def test_near_infrared_is_not_taken_for_alpha():
    image = pixels(8, 8, 4)
    options = {"photometric": "rgb", "extrasamples": ["unspecified"]}
    assert np.array_equal(view_of(tiff(image, **options), (8, 8), 4), image.transpose(2, 0, 1))
    with pytest.raises(UnreadableImage, match="^4 channels instead of 3"):
        view_of(tiff(image, **options), (8, 8), 3)


TURNED = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)}
TURNED |= {6: lambda a: np.rot90(a, -1), 8: np.rot90}


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_tiffs_are_turned_upright(kind, channels, compression, tmp_path):
    stored = (np.arange(40 * 60 * channels) % 251).astype(kind).reshape(40, 60, channels)
    options = {"photometric": "rgb" if channels == 3 else "minisblack", "compression": compression}
    options |= {"planarconfig": "contig"} if channels > 1 else {}
    for orientation, turn in TURNED.items():
        written = stored if channels > 1 else stored[..., 0]
        file = tiff(written, extratags=[(274, "H", 1, orientation, True)], **options)
        (tmp_path / "a.tif").write_bytes(file.getvalue())
        for way_in in (file, tmp_path / "a.tif"):
            found = decode(open_image(way_in), channels).array.transpose(1, 2, 0)
            assert np.array_equal(found, turn(stored)), orientation


def header(shape, descr="'|u1'", version=b"\1\0"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return io.BytesIO(b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (npy(np.zeros((9, 9, 5))), "5 channels instead of 7"),
        (npy(np.zeros((5, 9, 9))), "5 channels instead of 7"),
        (npy(np.zeros((9, 9))), "1 channel instead of 7"),
        (tiff(np.zeros((5, 9, 9), np.uint8), photometric="minisblack"), "5 channels instead of 7"),
        (png(np.zeros((9, 9, 3), np.uint16)), "3 channels instead of 7"),
        (npy(np.zeros((7, 9, 7))), "7x9x7 values: first or last axis may be"),
        (npy(np.zeros((2, 7, 9, 9))), "2x7x9x9 values, which is not one image"),
        (npy(np.zeros(9)), "not one image"),
        (npy(np.zeros((7, 0, 9))), "7x0x9 values, not between"),
        (npy(np.full((7, 9, 9), np.nan)), "NaN, infinite"),
        (npy(np.full((7, 9, 9), np.inf)), "NaN, infinite"),
        (npy(np.full((7, 9, 9), 1e200)), "NaN, infinite"),
        (npy(np.full((7, 9, 9), None)), "allow_pickle=False|Python objects"),
        (npy(np.full((7, 9, 9), "a")), "values of type <U1 cannot be pixels"),
        (npy(np.full((7, 9, 9), 1j)), "cannot be pixels"),
        (npy(np.zeros((7, 9, 9), [("a", "u1")])), "cannot be pixels"),
        (header("(7, 99999999999, 99999999999)"), ""),
        (header("(7, -9, -9)"), ""),
        (header("7, '"), ""),
        (io.BytesIO(npy(np.zeros((7, 9, 9))).getvalue()[:-9]), ""),
        (io.BytesIO(tiff(pixels(7, 9, 9)).getvalue()[:100]), ""),
        (io.BytesIO(tiff(pixels(9, 9, 3, dtype=np.uint16)).getvalue()[:-99]), ""),
        (io.BytesIO(png(pixels(9, 9, 3, dtype=np.uint16)).getvalue()[:99]), ""),
        (io.BytesIO(b"\x93NUMPY"), ""),
        (io.BytesIO(b"II*\0"), ""),
        (io.BytesIO(b""), "cannot identify what kind of image this is$"),
    ],
)
def test_what_cannot_be_used_is_unreadable(file, words, tmp_path):
    path = tmp_path / ("image" + {b"\x93N": ".npy", b"II": ".tif"}.get(file.getvalue()[:2], ".png"))
    path.write_bytes(file.getvalue())
    for given_as in (file, path):
        with pytest.raises(UnreadableImage, match=words):
            view_of(given_as, (8, 8), 7)


def test_damaged_lzw_does_not_end_the_process():
    """With the first codes changed, the decoder that tifffile takes crashes."""
    damaged = bytearray(tiff(np.ones((7, 9, 9), np.uint8), compression="lzw").getvalue())
    damaged[256:273] = bytes.fromhex("807960503824160d078442615011640e02")
    with suppress(UnreadableImage):
        view_of(io.BytesIO(damaged), (8, 8), 7)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for file in (
        npy(pixels(7, 20, 20)),
        tiff(pixels(7, 20, 20)),
        png(pixels(20, 20, 3, dtype=np.uint16)),
    ):
        with pytest.raises(UnreadableImage, match="values, not between 1 and 800|bomb"):
            view_of(file, (8, 8), 7 if b"PNG" not in file.getvalue()[:8] else 3)
    Image.new("L", (30, 30)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow, of the damage
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_damage_crashes(data):
    """Whatever bytes of a file are changed or cut off, it is an image or an unreadable one."""
    whole = data.draw(st.sampled_from(WHOLE_FILES))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(whole), 200) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        view = view_of(io.BytesIO(damaged[: data.draw(st.integers(0, len(whole)))]), (8, 8), 3)
    except UnreadableImage:
        return
    assert view.shape == (3, 8, 8) and np.isfinite(view).all()


WHOLE_FILES = [
    npy(np.ones((9, 9, 3), "f4")).getvalue(),
    png(np.ones((9, 9, 3), np.uint16)).getvalue(),
    tiff(np.ones((9, 9, 3), np.uint16)).getvalue(),
    tiff(np.ones((3, 9, 9), np.uint8), compression="lzw", photometric="minisblack").getvalue(),
]


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    for module, file in (
        ("tifffile", tiff(pixels(7, 9, 9))),
        ("imagecodecs", png(pixels(9, 9, 3, dtype=np.uint16))),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(
                UnreadableImage, match=rf"{module}: pip install 'hpm-vision\[multichannel"
            ):
                open_image(file)
            # What Pillow keeps whole needs none.
            for plain in (
                png(pixels(9, 9, dtype=np.uint16)),
                tiff(pixels(9, 9, dtype=np.uint16)),
                tiff(pixels(9, 9, 3)),
                npy(pixels(9, 9)),
            ):
                assert view_of(plain, (8, 8), 1).shape == (1, 8, 8)


def write(folder, name, file):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())
    return str(path)


def test_batches_of_one_source_are_of_one_kind(tmp_path):
    shallow, deep = png(pixels(9, 9, 3)), png(pixels(9, 9, 3, dtype=np.uint16))
    for number in range(3):
        write(tmp_path / "8", f"{number}.png", shallow)
        write(tmp_path / "mixed", f"{number}.png", deep if number == 1 else shallow)
        write(tmp_path / "16", f"{number}.tif", tiff(pixels(9, 9, 3, dtype=np.uint16)))
    for name, dtype in (("8", torch.uint8), ("mixed", torch.float32), ("16", torch.float32)):
        source = open_source(str(tmp_path / name)).train
        for part in (source, Subset(source, np.array([0, 2]))):
            batches = evaluation_batches(part, (8, 8), 3, 1)
            assert {batch.images.dtype for batch in batches} == {dtype}


def test_a_rare_deep_image_is_reduced():
    """One among those whose headers are not looked at."""

    class Rare(FileSource):
        def is_deep(self):
            return False

        def open(self, index):
            return open_image(npy(np.full((9, 9), 0.5)))

    view = Views(Rare("", ["a"]), EvaluationViews((8, 8), 1), False)[0, 0].view
    assert view.dtype == np.uint8 and (view == 128).all()


def test_found_in_folders_class_folders_and_lists(tmp_path):
    names = ["a/0.npy", "a/1.tif", "b/2.NPY", "b/3.tiff"]
    image = pixels(7, 9, 9)
    for name in names:
        file = npy(image) if name.lower().endswith("npy") else tiff(image)
        write(tmp_path, name, file)
    (tmp_path / "list.txt").write_text("\n".join(f"{name} {name[0]}" for name in names))
    for data in (tmp_path, tmp_path / "a", tmp_path / "list.txt", tmp_path / "a" / "0.npy"):
        source = open_source(str(data)).train
        (batch,) = evaluation_batches(source, (9, 9), 7, 4)
        assert (batch.images == torch.from_numpy(image)).all()
        assert source.labels is None or source.classes == ["a", "b"]


@pytest.mark.parametrize(("scale", "offset"), [(1e-5, 0), (1, 0), (500, -1000), (1, 290)])
def test_statistics_of_any_unit(tmp_path, scale, offset):
    values = np.random.default_rng(1).random((6, 7, 8, 8)) * scale + offset
    for index, image in enumerate(values):
        np.save(tmp_path / f"{index}.npy", image)
    np.save(tmp_path / "nan.npy", np.full((7, 8, 8), np.nan))
    source = open_source(str(tmp_path)).train
    mean, std = measure_statistics(source, (8, 8), 7, seed=0)
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-5)
    assert std == pytest.approx(values.std((0, 2, 3)).tolist(), rel=1e-3)
    (batch,) = evaluation_batches(source, (8, 8), 7, 8)
    assert [problem for _, problem in batch.unreadable] == [
        "some pixels are NaN, infinite or out of range"
    ]
    ours = normalize(batch.images, torch.tensor(mean), torch.tensor(std))
    assert ours.mean((0, 2, 3)).abs().max() < 1e-2 and (ours.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_constant_channels_do_not_blow_up(tmp_path):
    np.save(tmp_path / "0.npy", np.stack([np.full((8, 8), v) for v in (0, 1, 300.0)]))
    mean, std = measure_statistics(open_source(str(tmp_path)).train, (8, 8), 3, seed=0)
    assert mean == pytest.approx([0, 1, 300]) and min(std) >= 1e-3


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    """24 scenes of 7 bands in 16 bits, of two classes: one band tells which."""
    folder, rng = tmp_path_factory.mktemp("satellite"), np.random.default_rng(0)
    for number in range(24):
        bands = rng.integers(200, 4000, (20, 22, 7)).astype(np.uint16)
        bands[..., 5] += 4000 * (number % 2)
        (folder / f"class_{number % 2}").mkdir(exist_ok=True)
        np.save(folder / f"class_{number % 2}" / f"{number}.npy", bands)
    return folder


@pytest.fixture(scope="module")
def satellite_run(satellite, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "satellite"
    np.save(satellite / "class_0" / "broken.npy", np.zeros((9, 9, 5)))
    options = TINY | {"channels": 7, "workers": 1, "flip": "both"}
    run = hpm.pretrain(data=str(satellite), out=str(out), **options | {"holdout": 8})
    (satellite / "class_0" / "broken.npy").unlink()
    return run


def test_seven_channels_from_end_to_end(satellite, satellite_run, tmp_path):
    log = (satellite_run.folder / "train.log").read_text()
    assert "broken.npy (5 channels instead of 7), passed over" in log
    losses = [
        m["reconstruction_loss"] for m in satellite_run.metrics() if "reconstruction_loss" in m
    ]
    assert np.isfinite(losses).all()
    assert list(satellite_run.figures.glob("*.png"))
    common = {"out": str(tmp_path), "workers": 0, "baselines": True}
    run, data = str(satellite_run.folder), str(satellite)
    knn = hpm.evaluate("knn", run, data, k=(3,), **common)
    assert knn.values["raw pixels"]
    linear = hpm.evaluate("linear", run, data, lr=(0.1,), epochs=3, augment=True, **common)
    assert linear.values["trained, patch mean"]
    assert hpm.evaluate("attentive", run, data, lr=(1e-3,), epochs=2, **common).values
    assert hpm.evaluate("stats", run, data, **common).values
    assert hpm.evaluate("hardness", run, data, **common).hardness
    options = {"epochs": 8, "batch_size": 8, "base_lr": 4e-2, "mixup": 0, "cutmix": 0}
    common |= {"baselines": False, "flip": "vertical"}
    finetuned = hpm.evaluate("finetune", run, data, rand_augment="none", **options, **common)
    assert finetuned.values["trained"]["finetune"]["top1"] > 60
    config = ShowConfig(run, data, str(tmp_path / "show.png"), images=2)
    assert np.asarray(Image.open(show(config))).std() > 10


def test_the_encoder_takes_16_bits(satellite, satellite_run):
    encoder = satellite_run.load_encoder()
    source = open_source(str(satellite)).train
    scene = np.load(source.path(0))[2:18, 3:19].transpose(2, 0, 1).copy()
    images = torch.from_numpy(scene)[None]
    mean, std = encoder.mean.view(-1, 1, 1), encoder.std.view(-1, 1, 1)
    by_hand = (images.float() / 65535 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[0], encoder(by_hand)[0])
        loaded = torch.from_numpy(view_of(npy(scene), (16, 16), 7))[None]
        torch.testing.assert_close(encoder.normalize(loaded), by_hand, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(encoder(images)[0], encoder(by_hand.flip(1))[0]).all()


def test_16_bit_png_from_end_to_end(tmp_path):
    """Dark pictures, all of them within the lowest two of 8-bit levels."""
    for number in range(24):
        write(tmp_path / "data", f"{number}.png", png(pixels(20, 20, 3, dtype=np.uint16) // 128))
    run = hpm.pretrain(data=str(tmp_path / "data"), out=str(tmp_path / "run"), **TINY)
    trained = load(run.folder)
    assert trained.mean == pytest.approx([1 / 256] * 3, rel=0.05)
    assert min(trained.std) > 1e-3
    (batch,) = evaluation_batches(open_source(str(tmp_path / "data")).train, (20, 20), 3, 24)
    assert len(batch.images.unique()) > 300
    for number in range(24):
        below = tmp_path / "classes" / str(number % 2)
        below.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{number}.png").rename(below / f"{number}.png")
    with pytest.raises(hpm.UserError, match="knows 8 bits.*pass --rand-augment none"):
        hpm.evaluate("finetune", str(run.folder), str(tmp_path / "classes"), workers=0)


def test_all_of_other_channels_stop_the_run_at_once(satellite, tmp_path):
    for normalization in ("measured", "imagenet"):
        with pytest.raises(hpm.UserError, match=r"no readable image.*7 channels instead of 3\)$"):
            options = TINY | {"channels": 3, "normalize": normalization}
            hpm.pretrain(data=str(satellite), out=str(tmp_path / normalization), **options)


@pytest.mark.parametrize("channels", [0, 33])
def test_channels_out_of_bounds(channels, satellite, tmp_path):
    with pytest.raises(
        hpm.UserError, match=f"channels is {channels}; it must lie between 1 and 32"
    ):
        hpm.pretrain(data=str(satellite), out=str(tmp_path), channels=channels)


def test_workers_change_nothing(satellite):
    source = open_source(str(satellite)).train
    views = TrainingViews((16, 16), 7, 0, (0.2, 1.0), True, 4)
    keys = [[(0, 3), (0, 5)], [(1, 3), (1, 5)]]
    one, two = (list(training_loader(source, views, keys, w, False)) for w in (0, 2))
    for a, b in zip(one, two):
        assert torch.equal(a.images, b.images) and a.images.dtype == torch.float32

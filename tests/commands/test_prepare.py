"""A prepared set is the same images, labels and splits, smaller."""

import errno
import io
import json

import numpy as np
import pytest
from helpers import TINY, write_images
from PIL import Image

import hpm
from hpm.commands import prepare as preparing
from hpm.commands.cli import main
from hpm.commands.options import PrepareConfig
from hpm.commands.prepare import prepare
from hpm.core.errors import UserError
from hpm.data import demo
from hpm.data.arrays import ArrayImage
from hpm.data.sources import DemoSource, open_source
from hpm.data.transforms import decode


@pytest.fixture
def photos(tmp_path):
    """Two splits of two classes: large and small JPEG, PNG with and without holes, a broken one."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (60 + number, 90) if number % 2 else (30, 20)
                mode = ("RGB", "RGBA", "L")[number % 3]
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
                image = coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)
                image.save(folder / f"{number}.{'png' if mode == 'RGBA' else 'jpg'}")
    (tmp_path / "photos/train/cat/9.jpg").write_bytes(b"nothing")
    return tmp_path / "photos"


def config(data, out, **options):
    return PrepareConfig(**{"data": str(data), "out": str(out), "size": 32, "workers": 0} | options)


def test_labels_splits_and_pixels_are_kept(photos, tmp_path):
    made = prepare(config(photos, tmp_path / "out"))
    before, after = open_source(str(photos)), open_source(str(tmp_path / "out"))
    assert made.images == 16 and [p for p, _ in made.unreadable] == [before.train.path(6)]
    assert "9.jpg" in (tmp_path / "out/unreadable.txt").read_text()
    kept = np.delete(np.arange(13), 6)
    assert after.train.classes == before.train.classes == ["cat", "dog"]
    assert np.array_equal(after.train.labels, before.train.labels[kept])
    assert np.array_equal(after.test.labels, before.test.labels)
    for new, old in enumerate(kept):
        files = before.train.read(int(old)), after.train.read(new)
        first, then = (Image.open(io.BytesIO(file)) for file in files)
        if min(first.size) <= 32:
            assert files[0] == files[1]
            continue
        assert min(then.size) == 32 and then.mode == first.mode
        expected = np.asarray(first.resize(then.size, Image.Resampling.BICUBIC)).astype(int)
        assert abs(np.asarray(then).astype(int) - expected).mean() < 6  # JPEG


def test_any_number_of_processes_writes_the_same(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "SHARD_IMAGES", 3)
    for workers in (0, 2):
        prepare(config(photos, tmp_path / str(workers), workers=workers))
    files = [
        {
            p.relative_to(tmp_path / str(w)): p.read_bytes()
            for p in (tmp_path / str(w)).rglob("*.a*")
        }
        for w in (0, 2)
    ]
    assert len(files[0]) == 7 and files[0] == files[1]
    assert len(open_source(str(tmp_path / "2")).train) == 12


def test_it_goes_on_where_it_was_stopped(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "SHARD_IMAGES", 3)
    out, calls = tmp_path / "out", []
    shrunk = preparing.shrunk

    def full(source, index, *rest):
        calls.append(index)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return shrunk(source, index, *rest)

    monkeypatch.setattr(preparing, "shrunk", full)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(photos, out))
    assert len(list(out.rglob("*.arrow"))) == 2 and not list(out.rglob("*.tmp"))
    with pytest.raises(UserError, match="hpm prepare has not finished"):
        open_source(str(out))
    prepare(config(photos, out))
    assert len(calls) == 8 + 13 + 4 - 6
    assert prepare(config(photos, out)).images == 16 and len(calls) == 19
    with pytest.raises(UserError, match="started with size 32, not 16"):
        prepare(config(photos, out, size=16))
    (photos / "train/cat/9.jpg").unlink()
    with pytest.raises(UserError, match="choose another --out"):
        prepare(config(photos, out))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk(photos, tmp_path, monkeypatch, workers):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing, "SHARD_IMAGES", 3)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_write_rows", full)
        with pytest.raises(UserError, match="no space left"):
            prepare(config(photos, tmp_path / "out", workers=workers))
    assert prepare(config(photos, tmp_path / "out", workers=workers)).images == 16


def test_deep_images_stay_deep(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    kinds = {"a": np.uint16, "b": np.float32, "c": np.uint8, "d": np.int16}
    for name, kind in kinds.items():
        coarse = np.kron(rng.integers(0, 200, (7, 8, 6)), np.ones((1, 10, 10))).astype(kind)
        np.save(tmp_path / "deep" / f"{name}.npy", coarse)
    grey = np.full((50, 40), 40000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep" / "e.png")
    prepare(config(tmp_path / "deep", tmp_path / "out", channels=7))
    source = open_source(str(tmp_path / "out")).train
    assert source.is_deep() and len(source) == 5
    for index, kind in enumerate(kinds.values()):
        image, whole = source.open(index), np.load(tmp_path / "deep" / f"{'abcd'[index]}.npy")
        assert isinstance(image, ArrayImage)
        assert image.dtype == (np.float32 if kind == np.int16 else kind)
        small = decode(image, 7).array
        assert small.shape == (7, 43, 32)
        assert small.mean((1, 2)) == pytest.approx(whole.mean((1, 2)), rel=0.05)
    assert (decode(source.open(4), 1).array == 40000).all()


def write_tiff(path, array, **options):
    pytest.importorskip("tifffile").imwrite(path, array, **options)


def write_png(path, array):
    path.write_bytes(pytest.importorskip("imagecodecs").png_encode(np.ascontiguousarray(array)))


RGB_ALPHA = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
DEEP = {
    "grey.png": lambda path, v: write_png(path, v[..., 0]),
    "grey_alpha.png": lambda path, v: write_png(path, v[..., 2:]),
    "rgb.png": lambda path, v: write_png(path, v[..., :3]),
    "rgba.png": write_png,
    "rgb.tif": lambda path, v: write_tiff(path, v[..., :3], photometric="rgb"),
    "rgba.tif": lambda path, v: write_tiff(path, v, **RGB_ALPHA),
    "float_grey.tif": lambda path, v: write_tiff(path, v[..., 0] / np.float32(65535)),
    "float_rgb.tif": lambda path, v: write_tiff(
        path, v[..., :3] / np.float32(65535), photometric="rgb"
    ),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", DEEP)
def test_deep_colours_can_still_be_converted(name, channels, tmp_path):
    """What is prepared is read as other numbers of channels as the original is."""
    (tmp_path / "deep").mkdir()
    coarse = np.random.default_rng(0).integers(9000, 50000, (4, 5, 4))
    DEEP[name](tmp_path / "deep" / name, np.kron(coarse, np.ones((16, 16, 1))).astype(np.uint16))
    assert not prepare(config(tmp_path / "deep", tmp_path / "out", channels=channels)).unreadable
    views = [
        decode(open_source(str(folder)).train.open(0), channels).resized((32, 40), (0, 0, *size))
        for folder, size in ((tmp_path / "deep", (80, 64)), (tmp_path / "out", (40, 32)))
    ]
    assert views[0].dtype == views[1].dtype == np.float32
    assert abs(views[0] - views[1]).max() < 0.01  # of 255


@pytest.mark.parametrize(("suffix", "channels"), [("tif", 4), ("tif", 3), ("png", 3)])
def test_colours_do_not_depend_on_a_fourth_band(suffix, channels, tmp_path):
    """The bands of a TIFF, such as near infrared, are independent; with 3 channels, alpha is not
    used either."""
    (tmp_path / "bands").mkdir()
    bands = np.full((64, 64, 4), 200, np.uint8)
    bands[:, :32, 3] = 0
    Image.fromarray(bands).save(tmp_path / "bands" / f"a.{suffix}")
    prepare(config(tmp_path / "bands", tmp_path / "out", channels=channels))
    image = decode(open_source(str(tmp_path / "out")).train.open(0), channels)
    assert (image.height, image.width) == (32, 32)
    view = image.resized((16, 16), (0, 0, 32, 32))
    assert view[:, 8, 2].tolist() == [200, 200, 200, 0][:channels]


def test_pictures_that_were_never_files(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "train", 3)
    monkeypatch.setitem(demo.SIZES, "test", 2)
    prepare(config("demo", tmp_path / "out", size=64))
    source = open_source(str(tmp_path / "out")).train
    for index in range(3):
        drawn = DemoSource("train").open(index)
        assert np.array_equal(np.asarray(source.open(index)), np.asarray(drawn))


def test_prepared_images_train_and_are_evaluated(tmp_path):
    folder = write_images(tmp_path / "images", classes=2, per_class=40)
    assert main(["prepare", str(folder), "--out", str(tmp_path / "out"), "--size", "20"]) == 0
    short = TINY | {"steps": 2, "checkpoint_every": "100%"}
    run = hpm.pretrain(data=str(tmp_path / "out"), out=str(tmp_path / "run"), **short)
    again = hpm.pretrain(data=str(folder), out=str(tmp_path / "again"), **short)

    def losses(of):
        return [x["reconstruction_loss"] for x in of.metrics() if "reconstruction_loss" in x]

    assert losses(run) == losses(again)  # small images are kept as they are
    result = hpm.evaluate("knn", str(run.folder), str(tmp_path / "out"), baselines=False, k=(5,))
    assert result


def test_refusals(tmp_path, photos, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    out = tmp_path / "out"
    for data, into, words in [
        (tmp_path / "empty", out, "no images"),
        (tmp_path / "missing", out, "no such folder"),
        (photos, tmp_path / "mine", "was not made by hpm prepare"),
    ]:
        assert main(["prepare", str(data), "--out", str(into)]) == 2
        complaint = capsys.readouterr().err
        assert words in complaint and complaint.count("\n") == 1
    with pytest.raises(UserError, match="size must be"):
        prepare(config(photos, out, size=0))
    (tmp_path / "empty" / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no readable image"):
        prepare(config(tmp_path / "empty", tmp_path / "none"))


def test_damaged_sets_are_refused(photos, tmp_path):
    out = tmp_path / "out"
    prepare(config(photos, out))
    (shard,) = (out / "train").glob("*.arrow")
    shard.write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a readable Arrow data set"):
        open_source(str(out))
    (out / "dataset_dict.json").write_text(json.dumps({"splits": ["validation"]}))
    with pytest.raises(UserError, match="no split train"):
        open_source(str(out))

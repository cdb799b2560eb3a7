"""What is said about data that are passed over, left out, or cannot be read."""

import io

import numpy as np
import pytest
from helpers import TINY, write_images
from PIL import Image

import hpm
from hpm.data import folders, loader, notes
from hpm.data import workers as data_workers
from hpm.data.loader import EvaluationViews, training_loader
from hpm.data.opening import open_image
from hpm.data.sources import FileSource, open_source
from hpm.data.transforms import evaluation_view
from hpm.data.unreadable import UnreadableImages


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(notes, "_said", set())


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def test_other_kinds_are_counted_and_named_once(tmp_path, capsys):
    folder = write_images(tmp_path / "data", classes=1, per_class=2)
    touch(folder, "a.JXL", "b.jxl", "c.mp4", "notes.txt", ".hidden.jxl")
    for _ in range(2):
        assert len(open_source(str(folder)).train) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "passed over: 2 .jxl, 1 .mp4: convert images to JPEG" in said[0]
    assert "ffmpeg" in said[0]


def test_a_folder_of_other_kinds_alone(tmp_path):
    touch(tmp_path / "scans", "a.jp2", "b.jxl")
    with pytest.raises(hpm.UserError, match=r"no images.*1 .jp2, 1 .jxl: convert images to JPEG"):
        open_source(str(tmp_path / "scans"))


def test_heic_without_its_decoder_names_the_extra(tmp_path, monkeypatch):
    without = [s for s in folders.IMAGE_SUFFIXES if s not in folders.HEIC_SUFFIXES]
    monkeypatch.setattr(folders, "IMAGE_SUFFIXES", tuple(without))
    touch(tmp_path / "phone", "a.heic")
    with pytest.raises(hpm.UserError, match=r"1 .heic: for HEIC, pip install 'hpm-vision\[heic\]'"):
        open_source(str(tmp_path / "phone"))


def test_one_image_is_one_clear_line(tmp_path):
    folder = write_images(tmp_path / "data", classes=1, per_class=1)
    with pytest.raises(hpm.UserError, match="1 image") as caught:
        hpm.pretrain(data=str(folder), out=str(tmp_path / "run"), **TINY)
    assert "\n" not in str(caught.value)
    # The batch follows the data where it is not given: that trains, and says so.
    options = TINY | {"batch_size": None, "steps": 1}
    run = hpm.pretrain(data=str(folder), out=str(tmp_path / "run"), **options)
    assert "warning: there is 1 image to train on" in (run.folder / "train.log").read_text()


@pytest.mark.parametrize("kind", ["unspecified", "assocalpha", "unassalpha"])
def test_four_bands_of_a_tiff_are_bands(kind):
    """Whatever the fourth is called."""
    tifffile = pytest.importorskip("tifffile")
    bands = np.random.default_rng(0).integers(0, 256, (12, 12, 4), dtype=np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, bands, photometric="rgb", extrasamples=[kind])
    view = evaluation_view(open_image(file), (8, 8), 4)
    each = [evaluation_view(Image.fromarray(bands[..., i]), (8, 8), 1)[0] for i in range(4)]
    assert abs(view.astype(int) - np.stack(each)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_that_is_left_out_is_said_once(mode, tmp_path, capsys):
    for number in range(3):
        Image.new(mode, (9, 9)).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path)).train
    for _ in range(2):
        list(training_loader(source, EvaluationViews((8, 8), 3), [[(0, 0), (0, 1)]], 0, False))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "transparency (a fourth channel)" in said[0]
    list(training_loader(source, EvaluationViews((8, 8), 4), [[(0, 0)]], 0, False))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
def test_a_band_of_a_tiff_that_is_left_out_is_said_once(kind, tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile")
    for number in range(3):
        bands = np.zeros((12, 12, 4), np.uint8)
        tifffile.imwrite(tmp_path / f"{number}.tif", bands, photometric="rgb", extrasamples=[kind])
    source = open_source(str(tmp_path)).train
    for _ in range(2):
        list(training_loader(source, EvaluationViews((8, 8), 3), [[(0, 0), (0, 1)]], 0, False))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "(a fourth channel)" in said[0] and "--channels 4 keeps it" in said[0]


def test_opaque_images_are_not_mentioned(image_folder, capsys):
    source = open_source(str(image_folder)).train
    list(training_loader(source, EvaluationViews((8, 8), 3), [[(0, 0)]], 0, False))
    assert not capsys.readouterr().err


def no_space(*arguments):
    raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


# Its worker may take ten seconds to end, in the setup of the next test.
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_shared_memory_that_is_full(workers, image_folder, monkeypatch):
    source = open_source(str(image_folder)).train
    views = EvaluationViews((8, 8), 3)
    monkeypatch.setattr(loader, "collate", no_space)
    expected = (hpm.UserError, "/dev/shm.* is too small for 1 loading worker: .*--shm-size")
    if not workers:
        expected = (RuntimeError, "unable to write")  # something else
    with pytest.raises(expected[0], match=expected[1]) as caught:
        list(training_loader(source, views, [[(0, 0)]], workers, False))
    assert workers == 0 or "\n" not in str(caught.value)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (9, 8), (12, 11), (64, 16)])
def test_workers_by_default(cores, expected, monkeypatch):
    monkeypatch.setattr(data_workers, "usable_cores", lambda: cores)
    assert data_workers.num_workers(None) == expected and data_workers.num_workers(40) == 40


def test_unreadable_images_are_counted_once():
    reported = []
    unreadable = UnreadableImages(FileSource("x", [f"{i}.png" for i in range(10)]), 0.2)
    for problems in ([(3, "broken")], [(3, "broken")], [(4, "gone")]):
        unreadable.add(problems)
        unreadable.check(reported.append)
    assert reported == [
        "cannot read 3.png (broken), passed over",
        "cannot read 4.png (gone), passed over",
    ]
    again = UnreadableImages(unreadable.source, 0.2, unreadable.indices)
    again.add([(4, "gone"), (5, "broken")])
    with pytest.raises(hpm.UserError, match="3 of 10 images.*more than max_unreadable 0.2.*--max-"):
        again.check(reported.append)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """48 images, 9 of them unreadable."""
    folder = write_images(tmp_path_factory.mktemp("damaged"), classes=3, per_class=16)
    for path in sorted(folder.rglob("*.png"))[::5][:9]:
        path.write_bytes(b"broken")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        (
            "finetune",
            {"epochs": 1, "batch_size": 8, "rand_augment": "none", "mixup": 0, "cutmix": 0},
        ),
        ("linear", {"epochs": 1}),
        ("linear", {"epochs": 1, "augment": True}),
        ("attentive", {"epochs": 1, "cache_gb": 1e-9}),
        ("knn", {"k": (1,)}),
    ],
)
def test_too_many_unreadable_images_stop_an_evaluation(
    protocol, options, finished_run, damaged, tmp_path
):
    common = {"workers": 0, "device": "cpu", "baselines": False, "out": str(tmp_path / "out")}
    run = (protocol, str(finished_run.folder), str(damaged))
    with pytest.raises(hpm.UserError, match=r"images cannot be read, more than max_unreadable 0.1"):
        hpm.evaluate(*run, **options, **common)
    common["out"] = str(tmp_path / "lenient")
    assert hpm.evaluate(*run, max_unreadable=0.5, **options, **common)


def test_finetuning_names_what_it_cannot_read(finished_run, damaged, tmp_path):
    hpm.evaluate(
        "finetune",
        str(finished_run.folder),
        str(damaged),
        max_unreadable=0.5,
        epochs=1,
        batch_size=8,
        rand_augment="none",
        mixup=0,
        cutmix=0,
        workers=0,
        device="cpu",
        baselines=False,
        out=str(tmp_path),
    )
    (log,) = tmp_path.rglob("train.log")
    assert "cannot read" in log.read_text()

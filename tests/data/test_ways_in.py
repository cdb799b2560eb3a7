"""Ways to name images: several folders, tables, and data sets given as objects."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, write_images
from PIL import Image

import hpm
from hpm.commands.cli import main
from hpm.data.fingerprint import fingerprint
from hpm.data.given import named
from hpm.data.joined import several
from hpm.data.sources import open_source
from hpm.data.transforms import evaluation_view


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    return [write_images(root / name, classes=2, per_class=n) for name, n in (("a", 2), ("b", 3))]


def test_several_folders_are_one(folders):
    joined = open_source(",".join(map(str, folders))).train
    parts = [open_source(str(folder)).train for folder in folders]
    assert [joined.path(i) for i in range(len(joined))] == [
        part.path(i) for part in parts for i in range(len(part))
    ]
    assert joined.classes == parts[0].classes
    assert joined.labels.tolist() == [label for part in parts for label in part.labels]
    assert fingerprint(joined).keys() == fingerprint(parts[0]).keys()
    assert fingerprint(joined) != fingerprint(open_source(f"{folders[1]},{folders[0]}").train)


def test_labels_only_where_all_have_them(folders, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    joined = open_source(f"{folders[0]},{tmp_path}").train
    assert len(joined) == 5 and joined.labels is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("photos", ["photos"]),
        ("a/,b/", ["a/", "b/"]),
        ("a,", ["a"]),
        ("s3://x/{1,2}.tar", ["s3://x/{1,2}.tar"]),
        ("a,b-{1,2}.tar,c", ["a", "b-{1,2}.tar", "c"]),
    ],
)
def test_names_between_commas(data, expected):
    assert several(data) == expected


def test_a_folder_with_a_comma_in_its_name(tmp_path):
    folder = write_images(tmp_path / "a,b", classes=1, per_class=1)
    assert len(open_source(str(folder)).train) == 1


def test_several_folders_train(folders, tmp_path, capsys):
    run = hpm.pretrain([str(f) for f in folders], tmp_path / "run", **TINY)
    assert run.backbone.exists()
    out = tmp_path / "other"
    assert main(["pretrain", f"{folders[0]},{tmp_path}/missing", "--out", str(out)]) == 2
    assert "missing: no such folder" in capsys.readouterr().err
    assert not out.exists()


def table(folder: Path, text: str, name: str = "list.csv"):
    (folder / name).write_text(text)
    return open_source(str(folder / name)).train


@pytest.fixture
def images(tmp_path):
    for name in ("one.png", "two, too.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('path,width,label\none.png,8,cat\n"two, too.png",8,dog\n', "list.csv"),
        ('label,filename\ncat,one.png\ndog,"two, too.png"\n', "list.csv"),
        ("\ufeffImage;Class\none.png;cat\ntwo, too.png;dog\n", "list.csv"),
        ("one.png\tcat\ntwo, too.png\tdog\n", "list.tsv"),
    ],
)
def test_tables(images, text, name):
    source = table(images, text, name)
    assert [Path(source.path(i)).name for i in range(2)] == ["one.png", "two, too.png"]
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1]


def test_a_table_without_labels(images):
    source = table(images, 'file\none.png\n"two, too.png"\n')
    assert len(source) == 2 and source.labels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the list is empty"),
        ("picture,label\none.png,cat\n", "no column of images among picture, label"),
        ("path,label\nnone.png,cat\n", "row 2: no such image: none.png"),
        ("path,label\none.png,cat\none.png\n", "row 3: 1 of 2 columns"),
    ],
)
def test_mistakes_in_tables(images, text, message):
    with pytest.raises(hpm.UserError, match=message):
        table(images, text)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, make, targets=None):
        self.make = make
        if targets is not None:
            self.targets, self.classes = targets, ["cat", "dog"]

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index >= 12:
            raise IndexError
        return self.make(index)


PIXELS = np.random.default_rng(0).integers(0, 255, (12, 9, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: (Image.fromarray(PIXELS[i]), 0),
        lambda i: PIXELS[i],
        lambda i: torch.from_numpy(PIXELS[i]).permute(2, 0, 1),
        lambda i: {"image": Image.fromarray(PIXELS[i]), "label": 1},
        lambda i: [torch.from_numpy(PIXELS[i]).permute(2, 0, 1) / 255, 1],
    ],
    ids=["pair", "array", "tensor", "dictionary", "float"],
)
def test_items_of_a_data_set(make):
    source = open_source(named(Pictures(make))).train
    view = evaluation_view(source.open(3), (9, 8), 3)
    np.testing.assert_allclose(view, PIXELS[3].transpose(2, 0, 1), atol=1e-3)


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        ([1] * 12, [1] * 12),
        (torch.ones(12, dtype=torch.uint8), [1] * 12),
        ([f"masks/{n}.png" for n in range(12)], None),
        ([[0] * n for n in range(12)], None),
        (torch.rand(12), None),
        ([0, 1], None),
        ([], None),
    ],
)
def test_targets_of_a_data_set_that_are_no_labels(targets, labels):
    """Those of torchvision's VOCSegmentation are paths of masks."""
    source = open_source(named(Pictures(lambda i: PIXELS[i], targets))).train
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.classes == (["cat", "dog"] if labels else [])


def test_a_data_set_trains_and_is_evaluated(tmp_path):
    train = Pictures(lambda i: (Image.fromarray(PIXELS[i]), i % 2), [i % 2 for i in range(12)])
    test = Pictures(train.make, train.targets)
    assert named(train) == named(train) != named(test)
    run = hpm.pretrain(train, tmp_path / "run", **TINY)
    result = hpm.evaluate("knn", run, train, test=test, k=(1,), baselines=False)
    assert result.about["classes"] == 2
    assert hpm.embed(run, train).features.shape[0] == 12


def test_an_item_that_is_no_image_is_unreadable(tmp_path):
    from hpm.data.arrays import UnreadableImage

    source = open_source(named(Pictures(lambda i: "text"))).train
    with pytest.raises(UnreadableImage, match="str, not an image"):
        source.open(0)


def packed(folder: Path, file: Path, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        archive.add(folder, ".")
    return file


def test_a_tar_is_its_folder(folders, tmp_path):
    tar = packed(folders[0], tmp_path / "a.tar")
    source, folder = (open_source(str(data)).train for data in (tar, folders[0]))
    files = {Path(folder.path(i)).name: (folder.read(i), int(folder.labels[i])) for i in range(4)}
    found = {Path(source.path(i)).name: (source.read(i), int(source.labels[i])) for i in range(4)}
    assert found == files and source.classes == folder.classes
    assert np.asarray(source.open(0).convert("RGB")).shape[2] == 3
    assert fingerprint(source).keys() == {"names", "sizes"}


def test_archives_that_cannot_be_read_in_any_order(folders, tmp_path):
    whole = packed(folders[0], tmp_path / "a.tar")
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:3000])
    packed(folders[0], tmp_path / "a.tar.gz", "w:gz")
    for name, message in (("cut.tar", "not a whole tar"), ("a.tar.gz", "is compressed")):
        with pytest.raises(hpm.UserError, match=message):
            open_source(str(tmp_path / name))
    with tarfile.open(tmp_path / "out.tar", "w") as archive:
        archive.add(next(folders[0].rglob("*.png")), "../out.png")
    with pytest.raises(hpm.UserError, match="leads out of the archive"):
        open_source(str(tmp_path / "out.tar"))


def test_a_tar_is_evaluated(folders, tmp_path, finished_run):
    tar = packed(folders[1], tmp_path / "b.tar")
    result = hpm.evaluate("knn", finished_run, tar, test=tar, k=(1,), baselines=False)
    assert result.about["classes"] == 2

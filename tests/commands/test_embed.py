"""`hpm embed` and `hpm similar`."""

import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, run_here, write_images

import hpm
from hpm.commands import embed as module
from hpm.data.loader import evaluation_batches
from hpm.data.sources import open_source
from hpm.evals.embeddings import Embeddings
from hpm.evals.similarity import nearest, similar_pairs

OPTIONS = ["--workers=0", "--device=cpu", "--shard-images=20"]


def features_of(run, folder, teacher=False):
    """By a plain loop over the encoder."""
    encoder = hpm.load_encoder(run, teacher=teacher)
    size = tuple(encoder.encoder.image_size)
    (batch,) = evaluation_batches(open_source(str(folder)).train, size, 3, 1000)
    with torch.no_grad():
        return [part.numpy() for part in encoder(batch.images)]


@pytest.fixture(scope="module")
def written(finished_run, image_folder, tmp_path_factory):
    """The features of 48 images as a parquet file."""
    file = tmp_path_factory.mktemp("embedded") / "features.parquet"
    result = run_here("embed", finished_run.folder, image_folder, "--out", file, *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "48 images" in result.stdout
    return file


def test_one_row_per_image_with_path_and_label(written, finished_run, image_folder):
    found = Embeddings.load(written)
    source = open_source(str(image_folder)).train
    assert list(found.paths) == [source.path(index) for index in range(48)]
    assert list(found.labels) == [source.classes[label] for label in source.labels]
    pooled, _ = features_of(finished_run.folder, image_folder)
    np.testing.assert_allclose(found.features, pooled, atol=1e-5)
    assert not list(written.parent.glob("*.parts"))


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "folder"])
def test_every_format_holds_the_same(name, written, finished_run, image_folder, tmp_path):
    out = tmp_path / name
    options = ["--patches", "--dtype=float16"]
    command = ["embed", finished_run.folder, image_folder, "--out", out, *OPTIONS, *options]
    result = run_here(*command)
    assert result.returncode == 0, result.stderr
    found, expected = Embeddings.load(out, patches=True), Embeddings.load(written)
    assert list(found.paths) == list(expected.paths)
    assert list(found.labels) == list(expected.labels)
    assert found.features.dtype == found.patches.dtype == np.float16
    np.testing.assert_allclose(found.features, expected.features, atol=2e-3)
    _, patches = features_of(finished_run.folder, image_folder)
    np.testing.assert_allclose(found.patches, patches, atol=2e-3)
    assert "is complete already" in run_here(*command).stdout


def test_an_interrupted_one_goes_on(finished_run, image_folder, written, tmp_path, monkeypatch):
    out = tmp_path / "features.parquet"
    command = ["embed", finished_run.folder, image_folder, "--out", out, *OPTIONS]
    with monkeypatch.context() as patch:
        save, saved = module.Shards.save, []

        def save_one(self, *arguments):
            if saved:
                raise KeyboardInterrupt
            saved.append(save(self, *arguments))

        patch.setattr(module.Shards, "save", save_one)
        assert run_here(*command).returncode == 130
    assert not out.exists()
    result = run_here(*command)
    assert "1 of 3 shards are there" in result.stdout
    found, expected = Embeddings.load(out), Embeddings.load(written)
    np.testing.assert_array_equal(found.features, expected.features)


def test_unreadable_images_are_listed(finished_run, tmp_path):
    images = write_images(tmp_path / "images", per_class=4)
    (images / "class_1" / "002.png").write_bytes(b"no image")
    command = ["embed", finished_run.folder, images, "--out", tmp_path / "x.npy", *OPTIONS]
    result = run_here(*command)
    assert result.returncode == 0 and "1 image cannot be read" in result.stdout
    assert len(Embeddings.load(tmp_path / "x.npy")) == 11
    listed = (tmp_path / "x.unreadable.txt").read_text()
    assert listed.startswith(str(images / "class_1" / "002.png"))
    refused = run_here(*command[:4], tmp_path / "y.npy", *OPTIONS, "--max-unreadable=0.01")
    assert_refused(refused, "1 of 12 images cannot be read", "--max-unreadable")


def test_from_python(finished_run, image_folder, written):
    options = {"workers": 0, "device": "cpu"}
    found = hpm.embed(finished_run.folder, image_folder, pool="cls", **options)
    encoder = hpm.load_encoder(finished_run.folder, pool="cls")
    size = tuple(encoder.encoder.image_size)
    (batch,) = evaluation_batches(open_source(str(image_folder)).train, size, 3, 100)
    with torch.no_grad():
        np.testing.assert_allclose(found.features, encoder(batch.images)[0].numpy(), atol=1e-5)
    assert len(found) == 48 and found.about["pool"] == "cls"


def test_the_most_similar_images(written, image_folder, tmp_path):
    image = image_folder / "class_1" / "003.png"
    result = run_here("similar", written, image, "--count=4", "--out", tmp_path / "x.csv")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[:4]
    assert str(image) not in result.stdout and all("class_" in line for line in lines)
    values = [float(line.split()[0]) for line in lines]
    assert values == sorted(values, reverse=True)
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 5
    copy = tmp_path / "copy.png"
    shutil.copy(image, copy)
    first = run_here("similar", written, copy, "--count=1").stdout.split()
    assert float(first[0]) > 0.9999 and first[1] == str(image)


def test_searching_equals_a_naive_search():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)).astype(np.float32)
    unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    similarities = unit @ unit.T
    rows, values = nearest(features, features[7], 6)
    assert rows.tolist() == np.argsort(-similarities[7])[:6].tolist()
    np.testing.assert_allclose(values, np.sort(similarities[7])[::-1][:6], atol=1e-5)
    found = set()
    for first, second, _ in similar_pairs(features, 0.8, torch.device("cpu")):
        found |= set(zip(first.tolist(), second.tolist()))
    first, second = np.nonzero(np.triu(similarities > 0.8, 1))
    assert found == set(zip(first.tolist(), second.tolist()))


def test_an_index_finds_the_same(written, image_folder):
    pytest.importorskip("faiss")
    image = next(image_folder.rglob("*.png"))
    exact = run_here("similar", written, image, "--count=5")
    for _ in range(2):  # built, then read
        by_index = run_here("similar", written, image, "--count=5", "--approximate")
        assert by_index.returncode == 0, by_index.stderr
        assert by_index.stdout.splitlines()[:5] == exact.stdout.splitlines()[:5]
    assert written.with_name("features.parquet.faiss").exists()


def test_near_duplicates(finished_run, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    shutil.copy(images / "class_0" / "000.png", images / "class_2" / "copy.png")
    out = tmp_path / "x.safetensors"
    assert run_here("embed", finished_run.folder, images, "--out", out, *OPTIONS).returncode == 0
    result = run_here("similar", out, "--duplicates=0.99999", "--count=1")
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert "000.png" in first and "copy.png" in first and first.startswith("1.0000")


def test_mistakes(written, finished_run, image_folder, tmp_path):
    run = finished_run.folder
    refuse = lambda *words, says: assert_refused(run_here(*words), *says)  # noqa: E731
    refuse("embed", run, image_folder, "--out", tmp_path / "x.txt", says=[".parquet"])
    refuse("embed", run, image_folder, "--out", written, "--pool=cls", says=["pool mean, not cls"])
    refuse("embed", run, tmp_path / "none", "--out", tmp_path / "x.npy", says=["no such"])
    (tmp_path / "other.parquet").write_bytes(b"no parquet")
    refuse("similar", tmp_path / "other.parquet", "--duplicates=0.9", says=["other.parquet"])
    refuse("similar", written, says=["name an image to compare with"])
    refuse("similar", written, tmp_path / "none.png", says=["no such image"])
    other = hpm.pretrain(str(image_folder), tmp_path / "run", **TINY | {"steps": 1}).folder
    image = next(image_folder.rglob("*.png"))
    refuse("similar", written, image, "--run", other, says=["made with other weights"])

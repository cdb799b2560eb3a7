"""Features on disk are those that the encoder computes, whatever interrupts or divides the work."""

import csv
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from jobs import torchrun
from safetensors import safe_open

import hpm
from hpm.commands.embed import Embedded
from hpm.commands.embedding_shards import Shards
from hpm.core.extras import need
from hpm.core.files import read_tensors, write_tensors
from hpm.data.sources import open_source
from hpm.evals.embedder import Embedder
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder
from hpm.weights.own import save_backbone

QUICK = {"workers": 0, "device": "cpu", "batch_size": 10}
FLAGS = ("--workers", 0, "--device", "cpu", "--batch-size", 10)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """An encoder of random weights."""
    file = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    architecture = Architecture((16, 16), (4, 4), 3, 32, 1, 2)
    save_backbone(
        file, build_encoder(architecture, 0).state_dict(), architecture, [0.5] * 3, [0.3] * 3
    )
    return file


@pytest.fixture(scope="module")
def expected(backbone, image_folder):
    """What the encoder computes: (paths, pooled, class token, patches)."""
    source = open_source(str(image_folder)).train
    paths = [source.path(i) for i in range(len(source))]
    encoder = hpm.load_encoder(backbone)
    with torch.inference_mode():
        cls_token, patches = encoder.tokens(encoder.preprocess(paths))
    return paths, patches.mean(1).numpy(), cls_token.numpy(), patches.numpy()


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_features_in_memory(backbone, image_folder, expected):
    paths, pooled, cls_token, patches = expected
    found = hpm.embed(backbone, image_folder, patches=True, **QUICK)
    assert list(found.paths) == paths and found.ids.tolist() == list(range(48))
    assert found.labels.tolist() == [f"class_{i // 16}" for i in range(48)]
    close(found.features, pooled)
    close(found.patches, patches)
    close(hpm.embed(backbone, image_folder, pool="cls", **QUICK).features, cls_token)
    assert "48 images" in repr(found)


@pytest.mark.parametrize("name", ["f.parquet", "f.npy", "f.safetensors", "folder"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_format_keeps_everything(backbone, image_folder, expected, tmp_path, name, dtype):
    out = tmp_path / name
    options = ("--patches", f"--dtype={dtype}", "--shard-images=13", *FLAGS)
    command = ("embed", backbone, image_folder, "--out", out, *options)
    found = run_here(*command)
    assert found.returncode == 0, found.stderr
    assert "48 images, 32 features each" in found.stdout
    read = hpm.Embeddings.load(out, patches=True)
    assert list(read.paths) == expected[0] and read.ids.tolist() == list(range(48))
    assert read.labels.tolist()[16] == "class_1" and read.splits is None
    assert read.features.dtype == dtype and read.about["pool"] == "mean"
    np.testing.assert_allclose(read.features, expected[1], atol=2e-3)
    np.testing.assert_allclose(read.patches, expected[3], atol=1e-2)
    assert hpm.Embeddings.load(out).patches is None
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.rglob("*.tmp"))
    again = run_here(*command)
    assert again.returncode == 0 and "complete already" in again.stdout


def test_the_files_are_read_by_others(backbone, image_folder, expected, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("f.parquet", "f.npy", "g.safetensors"):
        hpm.embed(backbone, image_folder, tmp_path / name, report=lambda line: None, **QUICK)
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.schema.names == ["index", "path", "label", "features"]
    close(np.stack(table["features"].to_pylist()), expected[1])
    close(np.load(tmp_path / "f.npy"), expected[1])
    with open(tmp_path / "f.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[40] == {"index": "40", "path": expected[0][40], "label": "class_2"}
    with safe_open(tmp_path / "g.safetensors", "np") as file:
        close(file.get_tensor("features"), expected[1])


def test_splits_and_unlabelled_images(backbone, image_folder, tmp_path):
    for split, classes in (("train", ("class_0", "class_2")), ("val", ("class_1", "class_2"))):
        for name in classes:
            shutil.copytree(image_folder / name, tmp_path / "data" / split / name)
    found = hpm.embed(backbone, tmp_path / "data", tmp_path / "f", report=str, **QUICK)
    assert found.splits.tolist() == ["train"] * 32 + ["test"] * 32
    assert found.labels.tolist() == [f"class_{c}" for c in "0212" for _ in range(16)]
    flat = tmp_path / "flat"
    shutil.copytree(image_folder / "class_0", flat)
    assert hpm.embed(backbone, flat, **QUICK).labels is None


@pytest.mark.parametrize("name", ["f.npy", "folder"])
def test_it_goes_on_where_it_was_stopped(
    backbone, image_folder, expected, tmp_path, monkeypatch, name
):
    out, seen = tmp_path / name, []
    compute, save = Embedder._compute, Shards.save

    def counting(embedder, images):
        seen.append(len(images))
        return compute(embedder, images)

    def stop_at_third(shards, shard, *rest):
        if shard.start == 26:
            raise KeyboardInterrupt
        save(shards, shard, *rest)

    options = QUICK | {"shard_images": 13}
    monkeypatch.setattr(Embedder, "_compute", counting)
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "save", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            hpm.embed(backbone, image_folder, out, **options)
        stopped = run_here(
            "embed", backbone, image_folder, "--out", out, "--shard-images", 13, *FLAGS
        )
        assert stopped.returncode == 130 and "run the same command again" in stopped.stderr
    assert sum(seen) >= 39
    refused = run_here("embed", backbone, image_folder, "--out", out, "--pool", "cls", *FLAGS)
    assert_refused(refused, "was made with pool mean, not cls")
    refused = run_here("embed", backbone, image_folder, "--out", out, *FLAGS)
    assert_refused(refused, "was started with 4 shards, not 1", "--shard-images")
    with pytest.raises(hpm.UserError, match="no such file|has not finished"):
        hpm.Embeddings.load(out)
    seen.clear()
    lines = []
    found = hpm.embed(backbone, image_folder, out, lines.append, **options)
    assert sum(seen) == 1 + 48 - 26 and "2 of 4 shards are there" in lines[0]
    close(found.features, expected[1])


@pytest.fixture
def damaged(image_folder, tmp_path):
    """The images, with two that cannot be read among them."""
    folder = tmp_path / "damaged"
    shutil.copytree(image_folder, folder)
    for number in (0, 1):
        (folder / "class_0" / f"{number:03d}.png").write_bytes(b"nothing")
    return folder


def test_its_next_commands_can_be_pasted():
    said = Embedded(Path("my features.npy"), 2, 4, 0, None, "image").summary()
    command = said.partition(": ")[2].partition(", ")[0]
    assert shlex.split(command) == ["hpm", "similar", "my features.npy", "IMAGE"]


@pytest.mark.parametrize("shard", [2, 48])
def test_unreadable_images_are_listed(backbone, damaged, expected, tmp_path, shard):
    out = tmp_path / "f.safetensors"
    found = run_here("embed", backbone, damaged, "--out", out, "--shard-images", shard, *FLAGS)
    assert found.returncode == 0, found.stderr
    assert f"2 images cannot be read: {tmp_path / 'f.unreadable.txt'}" in found.stdout
    assert "001.png (cannot identify" in (tmp_path / "f.unreadable.txt").read_text()
    read = hpm.Embeddings.load(out)
    assert read.ids.tolist() == list(range(2, 48)) and read.labels[0] == "class_0"
    close(read.features, expected[1][2:])


def test_a_shard_without_a_readable_image(backbone, damaged, expected, tmp_path):
    """In a folder, it is a part without rows, of the same columns as the others."""
    dataset = pytest.importorskip("pyarrow.dataset")
    out = tmp_path / "folder"
    options = QUICK | {"shard_images": 2, "patches": True}
    found = hpm.embed(backbone, damaged, out, report=str, **options)
    assert found.ids.tolist() == list(range(2, 48)) and found.labels[0] == "class_0"
    close(found.features, expected[1][2:])
    close(found.patches, expected[3][2:])
    table = dataset.dataset(sorted(out.glob("*.parquet"))).to_table()
    assert table["path"].to_pylist() == list(found.paths)


def test_too_many_unreadable_images(backbone, damaged, tmp_path):
    out = tmp_path / "f.npy"
    arguments = ("embed", backbone, damaged, "--out", out, "--shard-images", 5, *FLAGS)
    refused = run_here(*arguments, "--max-unreadable", 0.02)
    assert_refused(refused, "2 of 48 images cannot be read", "f.unreadable.txt")
    assert not out.exists()
    assert run_here(*arguments).returncode == 0 and len(hpm.Embeddings.load(out)) == 46
    one = tmp_path / "one"
    one.mkdir()
    (one / "a.png").write_bytes(b"nothing")
    refused = run_here(
        "embed", backbone, one, "--out", tmp_path / "g.npy", *FLAGS, "--max-unreadable", 1
    )
    assert_refused(refused, "no readable image", "a.png")


def test_refusals(backbone, image_folder, tmp_path):
    def refused(*words, run=backbone, images=image_folder, out="f.npy", extra=()):
        found = run_here("embed", run, images, "--out", tmp_path / out, *FLAGS, *extra)
        assert_refused(found, *words)

    refused("no format for .h5", ".parquet", out="f.h5")
    (tmp_path / "empty").mkdir()
    refused("no images", images=tmp_path / "empty")
    refused("no such", images=tmp_path / "missing")
    refused("no such", run=tmp_path / "missing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    refused("was not made by hpm embed", out="mine")
    np.save(tmp_path / "theirs.npy", np.zeros(3))
    refused("not features of hpm embed", out="theirs.npy")
    (tmp_path / "f.csv").write_text("mine")
    refused("f.csv exists: choose another --out")
    (tmp_path / "f.csv").unlink()
    hpm.embed(backbone, image_folder, tmp_path / "f.npy", report=str, **QUICK)
    other = tmp_path / "other.safetensors"
    architecture = Architecture((16, 16), (4, 4), 3, 32, 1, 2)
    save_backbone(
        other, build_encoder(architecture, 1).state_dict(), architecture, [0.5] * 3, [0.3] * 3
    )
    refused("was made with other weights", "choose another --out", run=other)
    shutil.copytree(image_folder, tmp_path / "more")
    (tmp_path / "more" / "class_0" / "000.png").unlink()
    refused("number of images 48, not 47", images=tmp_path / "more")


def test_no_class_token(image_folder, tmp_path):
    need("timm", "timm", "this test")
    architecture = Architecture((32, 32), (16, 16), 3, 96, 9, 3, model="timm/test_vit3")
    encoder = build_encoder(architecture, 0)
    assert not encoder.has_class_token
    file = tmp_path / "b.safetensors"
    save_backbone(file, encoder.state_dict(), architecture, [0.5] * 3, [0.3] * 3)
    out = tmp_path / "f.npy"
    found = run_here("embed", file, image_folder, "--out", out, "--pool", "cls", *FLAGS)
    assert_refused(found, "has no class token: pass --pool mean")


def test_features_that_are_not_finite(backbone, image_folder, tmp_path):
    for value, dtype, words in (
        (float("nan"), "float32", "not finite"),
        (1e6, "float16", "pass --dtype float32"),
    ):
        tensors, meta = read_tensors(backbone)
        tensors["norm.bias"] = torch.full_like(tensors["norm.bias"], value)
        write_tensors(tmp_path / "b.safetensors", tensors, meta)
        options = ("--out", tmp_path / "f.npy", f"--dtype={dtype}", *FLAGS)
        found = run_here("embed", tmp_path / "b.safetensors", image_folder, *options)
        assert_refused(found, words)
        shutil.rmtree(tmp_path / "f.npy.parts", ignore_errors=True)


@pytest.mark.slow
def test_two_processes_write_the_same(backbone, image_folder, expected, tmp_path):
    out = tmp_path / "f.npy"
    command = ("embed", backbone, image_folder, "--out", out, "--shard-images=7", *FLAGS)
    done = torchrun("-m", "hpm", *command)
    assert done.returncode == 0, done.stderr
    close(hpm.Embeddings.load(out).features, expected[1])

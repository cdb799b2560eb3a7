"""`hpm similar` as a person types it."""

import csv
import shutil

import numpy as np
import pytest
from helpers import assert_refused, run_here, write_images
from PIL import Image

import hpm
from hpm.models.architecture import Architecture
from hpm.models.build import build_encoder
from hpm.weights.own import save_backbone
from hpm.weights.resolve import load

FLAGS = ("--device", "cpu")


@pytest.fixture(scope="module")
def features(finished_run, image_folder, tmp_path_factory):
    """The features of a folder that holds one image twice."""
    folder = tmp_path_factory.mktemp("similar")
    images = folder / "images"
    shutil.copytree(image_folder, images)
    shutil.copy(images / "class_1" / "003.png", images / "class_2" / "copy.png")
    out = folder / "f.npy"
    hpm.embed(
        finished_run.folder, images, out, str, pool="cls", crop_share=0.8, workers=0, device="cpu"
    )
    return out


def names(output):
    return [line.split()[1].rsplit("/", 2)[-2:] for line in output.splitlines()]


def test_an_image_finds_its_copy(features, tmp_path):
    image = features.parent / "images" / "class_1" / "003.png"
    out = tmp_path / "list.csv"
    found = run_here("similar", features, image, "--count", 3, "--out", out, *FLAGS)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 4 and lines[0].startswith("1.0000  ") and lines[0].endswith("  class_2")
    assert names(lines[0]) == [["class_2", "copy.png"]]
    assert not any("003.png" in line and "class_1" in line for line in lines[:3])
    with open(out, newline="") as file:
        assert [row["path"].rsplit("/", 1)[-1] for row in csv.DictReader(file)][0] == "copy.png"
    elsewhere = tmp_path / "elsewhere.png"
    shutil.copy(image, elsewhere)
    found = run_here("similar", features, elsewhere, "--count", 2, *FLAGS)
    assert {line.split()[0] for line in found.stdout.splitlines()} == {"1.0000"}


def test_a_clip_finds_itself_at_another_size(tmp_path):
    """The query is embedded at the size of the features, which need not be the encoder's."""
    rng = np.random.default_rng(0)
    for number in range(3):
        folder = tmp_path / "videos" / f"v{number}"
        folder.mkdir(parents=True)
        for frame in range(4):
            pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{frame:03d}.png")
    architecture = Architecture((2, 16, 16), (2, 4, 4), 3, 32, 1, 2)
    state = build_encoder(architecture, 0).state_dict()
    backbone = tmp_path / "b.safetensors"
    save_backbone(backbone, state, architecture, [0.5] * 3, [0.3] * 3)
    out, options = tmp_path / "f.npy", {"workers": 0, "device": "cpu"}
    hpm.embed(backbone, tmp_path / "videos", out, str, image_size=(24, 32), **options)
    shutil.copytree(tmp_path / "videos" / "v1", tmp_path / "query")
    found = run_here("similar", out, tmp_path / "query", "--count", 1, *FLAGS)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("1.0000  ") and "v1" in found.stdout


def test_duplicates(features, tmp_path):
    out = tmp_path / "pairs.csv"
    found = run_here("similar", features, "--duplicates", 1, "--out", out, *FLAGS)
    assert found.returncode == 0, found.stderr
    assert "1 pair of similarity 1 or more" in found.stdout
    with open(out, newline="") as file:
        (pair,) = csv.DictReader(file)
    assert pair["path"].endswith("class_1/003.png") and pair["other"].endswith("class_2/copy.png")
    many = run_here("similar", features, "--duplicates", 0.01, "--count", 4, *FLAGS)
    assert len(many.stdout.splitlines()) == 5


def test_refusals(features, finished_run, tmp_path):
    image = features.parent / "images" / "class_0" / "000.png"

    def refused(*words, arguments):
        assert_refused(run_here("similar", *arguments, *FLAGS), *words)

    refused("name an image", arguments=(features,))
    refused("name an image", arguments=(features, image, "--duplicates", 0.9))
    refused("no such image", arguments=(features, tmp_path / "missing.png"))
    refused("no such image", arguments=(features, features.parent / "images"))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    refused("broken.png cannot be read", arguments=(features, tmp_path / "broken.png"))
    refused("no such file", arguments=(tmp_path / "f.npy", image))
    refused("not features of hpm embed", arguments=(finished_run.backbone, image))
    refused("not features of hpm embed", arguments=(image, image))
    refused("not features of hpm embed", arguments=(finished_run.folder, image))
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    refused("not features of hpm embed", arguments=(tmp_path / "b.parquet", image))
    refused("--duplicates is 2", arguments=(features, "--duplicates", 2))
    # The run went on, or moved.
    other, trained = tmp_path / "other.safetensors", load(finished_run.folder)
    encoder = build_encoder(trained.architecture, seed=1)
    save_backbone(other, encoder.state_dict(), trained.architecture, trained.mean, trained.std)
    refused("made with other weights", arguments=(features, image, "--run", other))


def test_names_in_files_are_not_fetched(features, tmp_path):
    for file in features.parent.glob("f.*"):
        shutil.copy(file, tmp_path)
    about = tmp_path / "f.json"
    run = hpm.Embeddings.load(features).about["run"]
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20)).save(image)
    for name, words in (("timm/vit_base_patch16_224", "--run timm/"), ("/gone/run", "--run")):
        about.write_text(about.read_text().replace(run, name))
        assert_refused(run_here("similar", tmp_path / "f.npy", image, *FLAGS), words)
        run = name


def test_a_table_of_other_features_is_refused(features, tmp_path):
    for file in features.parent.glob("f.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "f.csv").write_text("index,path\n0,a.png\n")
    image = write_images(tmp_path / "images", 1, 1) / "class_0" / "000.png"
    assert_refused(run_here("similar", tmp_path / "f.npy", image, *FLAGS), "has 1 rows, but")

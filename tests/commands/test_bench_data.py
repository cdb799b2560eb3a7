"""What `hpm bench data` tells; its numbers depend on the machine."""

import json

import numpy as np
import pytest
from PIL import Image

from hpm.commands.bench_data import _limit, bench_data
from hpm.commands.cli import main
from hpm.commands.options import BenchDataConfig
from hpm.core.errors import UserError

SMALL = ["--image-size", "16", "--images", "16", "--batch-size", "4", "--repeats", "2"]


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.{('jpg', 'png')[number % 2]}")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"nothing")
    return tmp_path / "photos"


def test_bench_data(photos, tmp_path, capsys):
    file = tmp_path / "b.json"
    options = ["--workers", "2", "--images-per-second", "1e6", "--json", str(file)]
    assert main(["bench", "data", "--data", str(photos), *SMALL, *options]) == 0
    report = json.loads(file.read_text())
    assert report["bare"]["images_per_second"] > 0 and set(report["workers"]) == {"1", "2"}
    for found in report["workers"].values():
        assert found["best"] >= found["images_per_second"] > 0 and found["share_of_bare"] > 0
    each = report["workers"]["1"]["images_per_second"]
    assert report["workers_needed"] - 1 < 1e6 / each <= report["workers_needed"]
    shown = capsys.readouterr().out
    assert "bare libraries" in shown and "2 workers" in shown and "limited by" in shown
    assert "1e+06 images/s need" in shown


def test_sources_that_hold_no_files():
    report = bench_data(
        BenchDataConfig("demo", image_size=16, images=8, batch_size=4, repeats=1, workers=1)
    )
    assert report["bare"]["ms"]["decode"] > 0


def limit(read, decode, resize, shares, cores):
    phases = {"read": read, "decode": decode, "resize": resize}
    workers = {number: {"share_of_bare": share} for number, share in enumerate(shares, 1)}
    return _limit(phases, workers, cores).split(" ")[0].rstrip(":")


def test_what_limits():
    assert limit(5, 2, 1, [0.9], 4) == "reading"
    assert limit(0, 2, 1, [0.9, 0.9], 4) == "decoding"
    assert limit(0, 1, 2, [0.9, 0.9], 4) == "resizing"
    assert limit(0, 2, 1, [0.9, 0.9], 2) == "the"  # number of cores
    assert limit(0, 2, 1, [0.9, 0.5], 4) == "the"
    assert limit(0, 2, 1, [0.4, 0.4], 4) == "copying"


def test_refusals(tmp_path, capsys):
    assert main(["bench", "data", "--data", str(tmp_path / "none")]) == 2
    assert main(["bench", "nothing"]) == 2
    errors = capsys.readouterr().err
    assert "no such folder" in errors and "hpm bench step|segment|detect|data" in errors
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no image of 1 can be read"):
        bench_data(BenchDataConfig(str(tmp_path)))
    with pytest.raises(UserError, match="workers"):
        bench_data(BenchDataConfig("demo", workers=0))

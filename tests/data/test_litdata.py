"""LitData's optimised folders: read in any order and as a stream, and nothing is executed."""

import contextlib
import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
from litdata_folders import write_litdata
from PIL import Image
from shards import no_waiting, png, serving

from hpm.core.errors import UserError
from hpm.data.fingerprint import fingerprint
from hpm.data.litdata import LitDataSource
from hpm.data.sources import open_data, open_source
from hpm.data.streams.chunks import Chunks

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

COUNT = 20
PLAIN = {"index": "int", "image": "jpeg", "class": "int"}
ARROW = {"index": "int", "image": "bytes", "class": "str"}


def samples(label):
    return [{"index": n, "image": png(n), "class": label(n)} for n in range(COUNT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The two ways to store samples."""
    root = tmp_path_factory.mktemp("litdata")
    return {
        "plain": write_litdata(root / "plain", samples(lambda n: n % 3), PLAIN),
        "arrow": write_litdata(root / "arrow", samples(lambda n: f"c{n % 3}"), ARROW),
    }


@pytest.fixture(params=["plain", "arrow"])
def folder(folders, request):
    return folders[request.param]


def test_samples_in_any_order(folder):
    source = open_source(str(folder)).train
    assert len(source) == COUNT
    assert [source.read(n) for n in (13, 0, 7, 8, 19)] == [png(n) for n in (13, 0, 7, 8, 19)]
    assert source.open(3).size == (20, 20) and not source.is_deep()
    assert source.labels.tolist() == [n % 3 for n in range(COUNT)] and len(source.classes) == 3
    assert source.path(13).endswith("chunk-0-1.bin, sample 5")
    assert fingerprint(source)["rows"] == "20" and fingerprint(source)["sizes"]


@pytest.mark.parametrize("where", ["folder", "server", "server with faults"])
def test_the_stream_has_the_same_samples(folder, monkeypatch, where):
    no_waiting(monkeypatch)
    with serving(folder) as server:
        if "faults" in where:
            server.faults |= {"index.json": [503], "chunk-0-0.bin": [500, "cut", "cut"]}
        stream = open_data(str(folder) if where == "folder" else f"{server.url}/", in_order=True)
        assert isinstance(stream, Chunks) and stream.repeatable
        found = [[entry.data for entry in stream.read(shard)] for shard in range(3)]
    assert found == [[png(n) for n in range(a, b)] for a, b in ((0, 8), (8, 16), (16, 20))]


def test_splits(folders, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(folders["plain"])
    splits = open_source(str(tmp_path))
    assert len(splits.train) == len(splits.test) == COUNT
    assert open_data(str(tmp_path), in_order=True).name == str(tmp_path / "train")


def pil(pixels, mode):
    height, width = pixels.shape[:2]
    return struct.pack("<3I", width, height, len(mode)) + mode.encode() + pixels.tobytes()


def test_stored_pixels(tmp_path):
    rng = np.random.default_rng(0)
    colours, greys = (rng.integers(0, 255, shape, np.uint8) for shape in ((3, 4, 3), (3, 4)))
    stored = [pil(colours, "RGB"), pil(greys, "L"), pil(greys, "P"), b"short", b""]
    formats = {"0": "pil", "1": "int"}
    write_litdata(tmp_path, [{"0": data, "1": 7} for data in stored], formats)
    source = LitDataSource(tmp_path)
    assert np.array_equal(np.asarray(source.open(0)), colours)
    assert np.array_equal(np.asarray(source.open(1)), greys)
    assert source.labels.tolist() == [0] * 5 and source.classes == ["7"]  # of a list: the only one
    for index, words in {2: "mode P, not RGB or L", 3: "cut off", 4: "cut off"}.items():
        with pytest.raises(OSError, match=words):
            source.read(index)
    entries = list(Chunks(str(tmp_path)).read(0))
    assert [entry.problem is None for entry in entries] == [True, True, False, False, False]


class Harm:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_pickled_columns_are_refused_or_passed_over_but_never_loaded(tmp_path):
    harm = pickle.dumps(Harm())
    sample = {"image": harm, "meta": harm, "label": 1}
    formats = {"image": "pickle", "meta": "pickle", "label": "int"}
    write_litdata(tmp_path / "a", [sample], formats)
    for in_order in (False, True):
        with pytest.raises(UserError, match="image is stored as pickle, which executes code"):
            open_data(str(tmp_path / "a"), in_order=in_order)
    write_litdata(tmp_path / "b", [sample | {"image": png(1)}], formats | {"image": "jpeg"})
    assert open_source(str(tmp_path / "b")).train.read(0) == png(1)
    formats = {"image": "jpeg", "label": "pickle"}
    write_litdata(tmp_path / "c", [{"image": png(1), "label": harm}], formats)
    assert open_source(str(tmp_path / "c")).train.labels is None


def test_a_module_that_the_index_names_is_not_imported(folders, tmp_path):
    index = json.loads((folders["plain"] / "index.json").read_text())
    context = {"default_factory_module": "antigravity", "default_factory_name": "fly"}
    spec = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    index["config"]["data_spec"] = json.dumps([1, spec])
    for file in folders["plain"].glob("*.bin"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "index.json").write_text(json.dumps(index))
    before = set(__import__("sys").modules)
    assert LitDataSource(tmp_path).read(13) == png(13)  # the only column that is an image
    assert "antigravity" not in set(__import__("sys").modules) - before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"compression": "zstd"}, "chunks have compression, which is not supported"),
        ({"encryption": {"algorithm": "fernet"}}, "chunks have encryption"),
        ({"item_loader": "TokensLoader"}, "are for TokensLoader, and hold no images"),
        ({"data_format": ["int", "video", "int"]}, "image is stored as video: write images"),
        ({"data_format": 3}, "index.json is damaged"),
        ({"data_spec": "[1, {}]"}, "index.json is damaged"),
    ],
)
def test_folders_that_are_refused(tmp_path, config, words):
    write_litdata(tmp_path, samples(lambda n: n), PLAIN, **config)
    for in_order in (False, True):
        with pytest.raises(UserError, match=words) as error:
            open_data(str(tmp_path), in_order=in_order)
        assert "\n" not in str(error.value)


def test_without_an_image(tmp_path):
    write_litdata(tmp_path, [{"tokens": 1, "text": "a"}], {"tokens": "int", "text": "str"})
    with pytest.raises(UserError, match=r"no column holds images: tokens \(int\), text \(str\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["../chunk.bin", "/etc/passwd", "a\\b", ".."])
def test_chunks_outside_of_the_folder(tmp_path, name):
    write_litdata(tmp_path, samples(lambda n: n), PLAIN)
    text = (tmp_path / "index.json").read_text().replace("chunk-0-1.bin", json.dumps(name)[1:-1])
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match="leads out of the folder"):
        open_source(str(tmp_path))


def test_a_missing_chunk(tmp_path):
    write_litdata(tmp_path, samples(lambda n: n), PLAIN)
    (tmp_path / "chunk-0-1.bin").unlink()
    with pytest.raises(UserError, match=r"chunk-0-1.bin: the chunk is missing"):
        open_source(str(tmp_path))


def test_every_cut_of_a_chunk_is_one_line(folder, tmp_path):
    (tmp_path / "index.json").write_bytes((folder / "index.json").read_bytes())
    for other in ("chunk-0-1.bin", "chunk-0-2.bin"):
        (tmp_path / other).write_bytes((folder / other).read_bytes())
    whole = (folder / "chunk-0-0.bin").read_bytes()
    chunk = tmp_path / "chunk-0-0.bin"
    for length in [*range(60), *range(60, len(whole), 701), len(whole) - 1]:
        chunk.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged or cut off after \d images?") as error:
            list(Chunks(str(tmp_path)).read(0))
        assert "\n" not in str(error.value)
        source = LitDataSource(tmp_path)
        with pytest.raises(OSError):
            source.open(7)
        assert source.read(8) == png(8)


def test_any_damage_in_a_chunk_is_an_error_of_ours(folder, tmp_path):
    rng = np.random.default_rng(0)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (folder / "chunk-0-0.bin").read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(0, 60) if rng.random() < 0.5 else rng.integers(len(data)))
            data[place] = rng.integers(256)
        (tmp_path / "chunk-0-0.bin").write_bytes(data)
        source = LitDataSource(tmp_path)
        for number in range(8):
            with contextlib.suppress(OSError):
                source.read(number)
        with contextlib.suppress(UserError):
            list(Chunks(str(tmp_path)).read(0))
        with contextlib.suppress(UserError):
            assert len(source.labels) == COUNT


@pytest.mark.slow  # imports litdata, which takes seconds
@pytest.mark.parametrize("kind", ["plain", "arrow", "list"])
def test_what_the_library_writes(folders, tmp_path, kind):
    writer = pytest.importorskip("litdata.streaming.writer", reason="litdata is not installed")
    written = writer.BinaryWriter(str(tmp_path), chunk_size=8)
    for number in range(COUNT):
        file = io.BytesIO()
        Image.open(io.BytesIO(png(number))).convert("RGB").save(file, "JPEG")
        image = {"plain": Image.open(file), "arrow": png(number), "list": Image.open(file)}[kind]
        image = image.copy() if kind == "list" else image  # no longer a JPEG: its pixels are stored
        label = f"c{number % 3}" if kind == "arrow" else number % 3
        sample = {"index": number, "image": image, "class": label}
        written[number] = (image, label) if kind == "list" else sample
    written.done()
    written.merge()
    source = LitDataSource(tmp_path)
    assert source.labels.tolist() == [n % 3 for n in range(COUNT)]
    stream = Chunks(str(tmp_path))
    streamed = [entry.data for shard in range(3) for entry in stream.read(shard)]
    assert streamed == [source.read(n) for n in range(COUNT)]
    assert source.open(13).size == (20, 20)
    if kind == "arrow":
        assert source.read(13) == png(13)
        ours = (folders["arrow"] / "chunk-0-1.bin").read_bytes()
        assert (tmp_path / "chunk-0-1.bin").read_bytes() == ours
    index = json.loads((tmp_path / "index.json").read_text())
    if kind != "list":
        mine = json.loads((folders[kind] / "index.json").read_text())
        assert index["config"]["data_format"] == mine["config"]["data_format"]
        assert index["config"]["data_spec"] == mine["config"]["data_spec"]


def test_chunks_are_not_asked_for_one_by_one(folders, monkeypatch):
    asked, real = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **how: asked.append(str(path)) or real(path, **how)
    )
    assert len(LitDataSource(folders["plain"])) == COUNT
    assert not [path for path in asked if path.endswith(".bin")]

"""Data sets of the Hugging Face hub, from a hub on this machine: in any order and as streams."""

import errno
import json

import pytest
from hub import COMMIT, hub_in_use
from shards import png

from hpm.core.errors import UserError
from hpm.data.arrays import UnreadableImage
from hpm.data.columns import find_columns
from hpm.data.fingerprint import fingerprint
from hpm.data.hugging_face import HubName
from hpm.data.sources import open_data, open_source
from hpm.data.streams.head import open_entry
from hpm.data.streams.parquet import Parquet
from hpm.data.streams.row_entries import is_own

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
import pyarrow.parquet as pq  # noqa: E402

TRAIN = [*range(20), *range(100, 120)]  # numbers of the images, in two files


def table(numbers, hostile=None):
    """Rows as the library stores them. hostile: a path that stands in place of one image."""
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    if hostile:
        images[1] = {"bytes": None, "path": hostile}
    values = {"image": images, "label": [n % 3 for n in numbers], "size": [1.0] * len(numbers)}
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]},
        "size": {"_type": "Value", "dtype": "float64"},
    }
    about = json.dumps({"info": {"features": features}})
    return pa.table(values).replace_schema_metadata({"huggingface": about})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data sets of parquet files, and of image files."""
    root = tmp_path_factory.mktemp("hub")
    data = root / "me" / "flowers" / "data"
    data.mkdir(parents=True)
    for number in range(2):
        rows = table(TRAIN[20 * number :][:20])
        pq.write_table(rows, data / f"train-{number:05d}-of-00002.parquet", row_group_size=8)
    pq.write_table(table(range(1000, 1007)), data / "test-00000-of-00001.parquet")
    secret = root / "secret.png"
    secret.write_bytes(png(3))
    (root / "me" / "hostile").mkdir()
    pq.write_table(table(range(5), str(secret)), root / "me" / "hostile" / "train.parquet")
    for name, numbers in {"ant": (0, 1, 2), "bee": (3, 4)}.items():
        below = root / "me" / "files" / "train" / name
        below.mkdir(parents=True)
        for number in numbers:
            (below / f"{number}.png").write_bytes(png(number))
    return root


@pytest.fixture(scope="module")
def hub(root, tmp_path_factory):
    with hub_in_use(root, tmp_path_factory.mktemp("cache")) as hub:
        yield hub


@pytest.fixture(scope="module")
def flowers(hub):
    return open_source("hf://me/flowers")


def read(stream):
    return [entry.data for shard in range(len(stream.shards)) for entry in stream.read(shard)]


def test_splits_labels_and_images(flowers):
    train, test = flowers.train, flowers.test
    assert [train.read(n) for n in range(len(train))] == [png(n) for n in TRAIN]
    assert train.labels.tolist() == [n % 3 for n in TRAIN]
    assert train.classes == ["ant", "bee", "cat"]
    assert len(test) == 7 and test.open(0).size == (20, 20)
    assert train.path(3) == "hf://me/flowers (train), row 3"
    assert fingerprint(train)["rows"] == "40" and fingerprint(train)["sizes"]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("hf://me/flowers:test", range(1000, 1007)),
        ("hf://datasets/me/flowers/default:train[:5]", TRAIN[:5]),
        (f"hf://me/flowers@{COMMIT}:train", TRAIN),
        ("hf://me/flowers:train?label=size&image=image", None),
    ],
)
def test_names(flowers, name, numbers):
    if numbers is None:
        with pytest.raises(UserError, match="column size holds float64, not labels"):
            open_source(name)
        return
    splits = open_source(name)
    assert [splits.train.read(n) for n in range(len(splits.train))] == [png(n) for n in numbers]
    assert splits.test is None


def test_a_stream_stores_nothing_and_reads_row_groups(hub):
    stream = open_data("hf://me/flowers", in_order=True)
    assert len(stream.shards) == 6  # of two files, each with row groups of 8, 8 and 4
    assert read(stream) == [png(n) for n in TRAIN]
    assert [entry.data for entry in stream.read(4)] == [png(n) for n in TRAIN[28:36]]
    assert [e.data for e in open_data("hf://me/flowers:test", in_order=True).read(0)] == [
        png(n) for n in range(1000, 1007)
    ]


def test_a_fault_that_passes_is_not_seen(hub, monkeypatch):
    stream = open_data("hf://me/flowers", in_order=True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.failures = 2
    assert read(stream) == [png(n) for n in TRAIN]
    assert hub.failures == 0


def test_a_row_group_is_one_request_for_one_column(hub):
    stream = open_data("hf://me/flowers", in_order=True)
    hub.requests.clear()
    assert read(stream) == [png(n) for n in TRAIN]
    assert len(hub.requests) == 6
    assert all(path.endswith(".parquet") for _, path in hub.requests)


def test_a_fault_within_a_row_group(hub, monkeypatch):
    """Rows that were read before are not read again."""
    stream = open_data("hf://me/flowers", in_order=True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rows, calls = stream._rows, []

    def broken(*part):
        calls.append(part)
        for number, entry in enumerate(rows(*part)):
            if number == 2 * len(calls) and len(calls) < 4:
                raise ConnectionError("reset")
            yield entry

    monkeypatch.setattr(stream, "_rows", broken)
    assert [entry.data for entry in stream.read(1)] == [png(n) for n in TRAIN[8:16]]
    assert len(calls) == 4


@pytest.mark.parametrize("failures", [1, 36])
def test_a_fault_that_stays_is_one_line(hub, monkeypatch, failures):
    """huggingface_hub makes six attempts, and each of ours is one of its."""
    stream = open_data("hf://me/flowers", in_order=True)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(hub, "failures", failures)
    if failures == 36:
        with pytest.raises(UserError, match=r"shard 2 of 6: .*503.* \(6 attempts\)"):
            list(stream.read(2))
        assert hub.failures == 0 and [w for w in waits if w >= 0.5].count(0.5) == 1
    else:
        assert [entry.data for entry in stream.read(2)] == [png(n) for n in TRAIN[16:20]]


def test_a_file_that_is_gone_is_not_tried_again(root, hub, monkeypatch):
    stream = open_data("hf://me/flowers", in_order=True)
    monkeypatch.setattr("time.sleep", None)
    hub.requests.clear()
    file = root / "me" / "flowers" / "data" / "train-00000-of-00002.parquet"
    file.rename(file.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match="shard 0 of 6: .*404"):
            list(stream.read(0))
    finally:
        file.with_suffix(".away").rename(file)
    assert len(hub.requests) == 1


def test_image_files(hub):
    source = open_source("hf://me/files").train
    assert [source.read(n) for n in range(5)] == [png(n) for n in range(5)]
    assert source.labels.tolist() == [0, 0, 0, 1, 1] and source.classes == ["ant", "bee"]
    stream = open_data("hf://me/files", in_order=True)
    assert read(stream) == [png(n) for n in range(5)] and len(stream.shards) == 1


def test_a_path_in_a_table_is_not_read(hub):
    source = open_source("hf://me/hostile").train
    assert source.read(2) == png(2)
    with pytest.raises(OSError, match="no bytes in this row"):
        source.read(1)
    entries = list(open_data("hf://me/hostile", in_order=True).read(0))
    assert [entry.data for entry in entries[2:]] == [png(n) for n in (2, 3, 4)]
    with pytest.raises(UnreadableImage, match="no bytes in this row"):
        open_entry(entries[1])


def test_addresses_that_are_opened():
    def own(path):
        return is_own(path, "hf://datasets/me/flowers@")

    assert own("hf://datasets/me/flowers@main/a.png")
    assert own("zip://a.png::hf://datasets/me/flowers@main/a.zip")
    for other in (
        "/etc/passwd",
        "http://127.0.0.1/a.png",
        "hf://datasets/me/other@main/a.png",
        "hf://datasets/me/flowers2@main/a.png",
        "reference://a::hf://datasets/me/flowers@main/a.json",
        "file:///etc/passwd::hf://datasets/me/flowers@main/a",
        "hf://datasets/me/flowers@main/a::/etc/passwd",
    ):
        assert not own(other), other


def test_without_a_network_the_cache_is_used(flowers, hub, monkeypatch):
    requests = len(hub.requests)
    assert len(open_source("hf://me/flowers", trusted=False).train) == 40
    with pytest.raises(UserError, match=r"files2 is not on disk .* not downloaded: .*me/files2"):
        open_source("hf://me/files2", trusted=False)
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: False)
    assert len(open_source("hf://me/flowers").train) == 40
    with pytest.raises(UserError, match="files2 is not on disk .* cannot be reached; download it"):
        open_source("hf://me/files2")
    assert len(hub.requests) == requests


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://me/flowers:val", r"[Ss]plit:? \"?val.* \['train', 'test'\]"),
        ("hf://me/flowers/small", "BuilderConfig 'small' not found. Available: .'default'"),
        (
            "hf://me/flowers?image=imag",
            "no column imag for image; did you mean 'image'.*size",
        ),
        ("hf://me/flowers?image=size", r"column size holds float64, not images \(image \(image\)"),
        ("hf://me/nothing", "'me/nothing' doesn't exist on the Hub"),
        ("hf://me/flowers@nothing", "Revision Not Found"),
        ("hf://flowers", "write hf://user/name"),
        ("hf://me/flowers?column=x", "write hf://user/name"),
    ],
)
def test_a_mistake_is_one_line(hub, name, words, in_order):
    with pytest.raises(UserError, match=words) as error:
        open_data(name, in_order=in_order)
    assert "\n" not in str(error.value)


def test_mistakes_with_streams(hub, image_folder):
    with pytest.raises(UserError, match="part of a split cannot be streamed"):
        open_data("hf://me/flowers:train[:5]", in_order=True)
    with pytest.raises(UserError, match="--stream reads hf://user/name, parquet"):
        open_data(str(image_folder), in_order=True)
    with pytest.raises(UserError, match="--stream reads"):
        open_data("demo", in_order=True)


def test_a_missing_library(monkeypatch):
    from hpm.data import hugging_face

    hugging_face.library_for.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for in_order in (False, True):
        with pytest.raises(
            UserError, match=r"needs datasets: pip install 'hpm-vision\[datasets\]'"
        ):
            open_data("hf://me/flowers", in_order=in_order)


def test_a_name():
    text = "hf://me/a.b@refs%2Fconvert%2Fparquet/de:train?image=x&label=y"
    expected = HubName(text, "me/a.b", "refs/convert/parquet", "de", "train", "x", "y")
    assert HubName.parse(text) == expected


def test_columns():
    photo, number = datasets.Image(), datasets.Value("int64")
    names = datasets.ClassLabel(names=["a", "b"])

    def found(features, image=None, label=None):
        return find_columns("data", features, image, label)

    one = found({"photo": photo, "fine": names, "x": number})
    assert (one.media, one.label, one.classes) == ("photo", "fine", ("a", "b"))
    assert found({"a": photo, "image": photo}).media == "image"
    two = found({"a": photo, "b": photo, "x": number}, image="b", label="x")
    assert (two.media, two.label, two.classes) == ("b", "x", ())
    assert found({"fine": names, "coarse": names, "photo": photo}).label is None
    assert found({"image": datasets.Value("binary")}).media == "image"
    with pytest.raises(UserError, match="several columns hold images .a, b.*image=a"):
        found({"a": photo, "b": photo})
    with pytest.raises(UserError, match=r"no column holds images; it has x \(integers\)"):
        found({"x": number})
    with pytest.raises(UserError, match="it has no columns"):
        found(None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same rows as parquet, and as `save_to_disk` writes them."""
    root = tmp_path_factory.mktemp("saved")
    (root / "parquet").mkdir()
    rows = table(range(20))
    pq.write_table(rows, root / "parquet" / "train.parquet", row_group_size=8)
    pq.write_table(rows.slice(0, 3), root / "parquet" / "test.parquet")
    data = datasets.Dataset(rows)
    shards = {"train": 3, "test": 1}
    datasets.DatasetDict(train=data, test=data).save_to_disk(root / "arrow", num_shards=shards)
    return root


def test_a_table_without_types(tmp_path):
    """As other programs write it; without a path, its column has no type."""
    values = {"image": [{"bytes": png(n), "path": None} for n in range(5)], "label": [1] * 5}
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    assert read(open_data(str(tmp_path / "a.parquet"), in_order=True)) == [png(n) for n in range(5)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([png(0), None, png(2)], pa.large_binary()),
        pa.array([{"bytes": png(0)}, None, {"bytes": png(2)}]),
        pa.array([{"path": "a.png", "bytes": x} for x in (png(0), None, png(2))]),
        pa.array([{"bytes": x, "name": "a"} for x in (png(0), None, png(2))]),
    ],
)
def test_forms_of_a_column(tmp_path, column):
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    first, none, last = open_data(str(tmp_path / "a.parquet"), in_order=True).read(0)
    assert (first.data, last.data) == (png(0), png(2))
    assert none.problem == "no bytes in this row"


def test_arrays_and_paths_in_a_table(tmp_path):
    """As a hub's README may say that they are images."""

    def read(column):
        pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
        return list(Parquet("data", [str(tmp_path / "a.parquet")], "image").read(0))

    three_axes = pa.list_(pa.list_(pa.list_(pa.uint8())))
    arrays = read(pa.array([[[[n, 0, 0]] * 20] * 20 for n in (1, 2)], three_axes))
    assert [open_entry(entry).size for entry in arrays] == [(20, 20)] * 2
    for column in (["/etc/passwd"], [{"path": "/etc/passwd"}]):
        assert [entry.problem for entry in read(column)] == ["no bytes in this row"]


def test_a_large_image_in_a_table_is_passed_over(saved, monkeypatch):
    monkeypatch.setattr("hpm.data.streams.row_entries.LARGEST", 10)
    entries = list(open_data(str(saved / "parquet"), in_order=True).read(0))
    assert {entry.problem for entry in entries} == {"more than 10 bytes"}


def test_files_of_other_columns(saved, tmp_path):
    for number, name in enumerate(("image", "photo")):
        pq.write_table(pa.table({name: [png(number)]}), tmp_path / f"{number}.parquet")
    stream = open_data(str(tmp_path), in_order=True)
    assert [entry.data for entry in stream.read(0)] == [png(0)]
    with pytest.raises(UserError, match="shard 1 of 2: no column image in .*1.parquet"):
        list(stream.read(1))


@pytest.mark.parametrize("checksums", [False, True])
def test_damaged_parquet_is_one_line(tmp_path, monkeypatch, checksums):
    monkeypatch.setattr("time.sleep", None)  # it is not read again
    file = tmp_path / "a.parquet"
    options = {"compression": "none" if checksums else "snappy", "row_group_size": 4}
    pq.write_table(table(range(8)), file, write_page_checksum=checksums, **options)
    whole = file.read_bytes()
    stream = open_data(str(file), in_order=True)
    at = whole.index(png(5)[-40:])
    file.write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
    assert [entry.data for entry in stream.read(0)] == [png(n) for n in range(4)]
    if checksums:
        with pytest.raises(UserError, match="shard 1 of 2: .*(CRC|checksum)"):
            list(stream.read(1))
    for length in (0, 3, 500, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="shard 1 of 2: ") as error:
            list(stream.read(1))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="not readable parquet"):
            open_data(str(file), in_order=True)


def test_a_table_that_is_stale_for_a_moment(saved, monkeypatch):
    stream = open_data(str(saved / "parquet"), in_order=True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    opened, attempts = stream._opened, []

    def stale(file):
        attempts.append(file)
        if len(attempts) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(file)

    monkeypatch.setattr(stream, "_opened", stale)
    assert [entry.data for entry in stream.read(0)] == [png(n) for n in range(8)]
    assert len(attempts) == 3


@pytest.mark.parametrize("kind", ["parquet", "arrow", "parquet/train.parquet", "arrow/train"])
def test_tables_on_a_disk_in_any_order_and_as_a_stream(saved, monkeypatch, kind):
    monkeypatch.setattr("socket.socket.connect", None)  # nobody is asked
    source = open_source(str(saved / kind)).train
    assert [source.read(n) for n in range(len(source))] == [png(n) for n in range(20)]
    assert source.classes == ["ant", "bee", "cat"]
    stream = open_data(str(saved / kind), in_order=True)
    assert read(stream) == [png(n) for n in range(20)] and len(stream.shards) == 3


def test_a_damaged_table_does_not_crash(saved, tmp_path):
    """Arrow checks nothing on its own: an offset beyond the data was a segmentation fault."""
    folder = tmp_path / "damaged"
    datasets.Dataset(table(range(4))).save_to_disk(folder)
    file = next(folder.glob("*.arrow"))
    data = bytearray(file.read_bytes())
    ends = b"".join(
        sum(len(png(n)) for n in range(count)).to_bytes(4, "little") for count in range(5)
    )
    place = data.index(ends)
    data[place + 8 : place + 12] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(UserError, match="the table is damaged"):
        open_source(str(folder))

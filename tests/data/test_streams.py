"""Shards of images: who reads what, in which order, and what becomes of damage on the way."""

import errno
import io
import itertools
import pickle
import shutil
import tarfile
import threading
import tracemalloc
from collections import Counter
from itertools import islice

import pytest
from shards import no_waiting, png, serving, write_shards, write_tar

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.data.sources import open_data, open_source
from hpm.data.streams import transport
from hpm.data.streams.archives import Archives, images_of
from hpm.data.streams.head import first_images
from hpm.data.streams.lanes import Lane, read_ahead
from hpm.data.streams.loading import Sharing, share_workers
from hpm.data.streams.shards import find_shards
from hpm.data.streams.stream import Stream
from hpm.data.tars import TarSource
from hpm.training import build


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=5)


@pytest.fixture
def stream(shards):
    return Archives(f"{shards}/s-*.tar")


def take(lane, count):
    return [(read.epoch, read.entry.name) for read in islice(lane, count)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_every_image_is_read_once_in_each_epoch_whatever_the_number_of_lanes(stream, lanes):
    names = {entry.name for shard in range(5) for entry in stream.read(shard)}
    found = Counter()
    for number in range(lanes):
        # So long that the first two epochs are over for certain.
        found += Counter(take(Lane(stream, number, lanes, seed=3, block=7), 5 * len(names)))
    for epoch in (0, 1):
        assert {name for e, name in found if e == epoch} == names
    assert set(found.values()) == {1}


def test_lanes_are_shuffled_by_seed_and_epoch(stream):
    count = sum(12 + shard for shard in range(5))
    one = take(Lane(stream, 0, 1, seed=3, block=16), 2 * count)
    assert one == take(Lane(stream, 0, 1, seed=3, block=16), 2 * count)
    assert one != take(Lane(stream, 0, 1, seed=4, block=16), 2 * count)
    first, second = ([n for e, n in one if e == epoch] for epoch in (0, 1))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("block", [1, 7, 16, 200])
def test_a_lane_goes_on_at_any_image(stream, block, ahead):
    whole = Lane(stream, 1, 2, seed=0, block=block)
    expected, cursors = [], []
    for read in islice(whole, 150):
        cursors.append(whole.cursor)
        expected.append((read.epoch, read.entry.name))
    for stop in (0, 1, 6, 15, 16, 17, 60, 110):
        lane = Lane(stream, 1, 2, seed=0, block=block, cursor=cursors[stop], ahead=ahead)
        assert take(lane, 30) == expected[stop + 1 : stop + 31]


def test_going_on_does_not_read_the_shards_before(stream):
    read = []

    class Watched(Archives):
        def read(self, shard):
            read.append(shard)
            return super().read(shard)

    watched = Watched(stream.name)
    lane = Lane(watched, 0, 1, seed=0, block=4)
    list(islice(lane, 50))
    cursor = lane.cursor
    assert len(read) > 3
    read.clear()
    next(Lane(watched, 0, 1, seed=0, block=4, cursor=cursor))
    assert len(read) <= 2


def test_reading_ahead_is_one_item_ahead():
    made, threads = [], []

    def items():
        for number in range(5):
            made.append(number)
            threads.append(threading.current_thread())
            yield number

    ahead = read_ahead(items())
    for number in range(5):
        assert next(ahead) == number
        while len(made) < min(number + 2, 5):  # the thread is at work
            threading.Event().wait(0.001)
        threading.Event().wait(0.01)
        assert len(made) == min(number + 2, 5)
    assert list(ahead) == [] and threading.current_thread() not in threads
    threads[0].join(10)
    assert not threads[0].is_alive()


def test_a_thread_that_reads_ahead_ends_with_its_reader():
    thread = None

    def items():
        nonlocal thread
        thread = threading.current_thread()
        yield from itertools.count()

    ahead = read_ahead(items())
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [False, True])
def test_damage_in_a_lane_is_met_where_it_is(shards, tmp_path, ahead):
    path = tmp_path / "s.tar"
    path.write_bytes((shards / "s-4.tar").read_bytes()[:20000])
    intact = []
    with pytest.raises(UserError):
        intact += (entry.name for entry in images_of(str(path)))
    lane, used = Lane(Archives(str(path)), 0, 1, seed=0, block=2, ahead=ahead), []
    with pytest.raises(UserError, match=f"cut off after {len(intact)} images"):
        used += (read.entry.name for read in lane)
    assert len(intact) > 4 and sorted(used) == intact[: len(intact) // 2 * 2]


def test_images_that_are_held_out_are_left_out(stream):
    lane = Lane(stream, 0, 1, seed=0, block=4, first_index=5)
    names = {name for _, name in take(lane, 300)}
    assert len(names) == 70 - 5 and "0_004.png" not in names and "0_005.png" in names


def test_a_stream_without_an_image_left_ends(stream):
    with pytest.raises(UserError, match="no image is left"):
        next(Lane(stream, 0, 1, seed=0, block=4, first_index=1 << 40))


def test_who_reads_which_lanes():
    for world_size in (1, 2, 4):
        parts = [Sharing(4, 3, rank, world_size).lanes(7) for rank in range(world_size)]
        assert [*itertools.chain(*parts)] == [1, 4, 7, 10]  # the same batch, in the same order


def test_a_resumed_run_keeps_its_lanes(stream):
    begun = Sharing(4, 6)
    assert share_workers(stream, 4, 1, 2, begun) == (3, Sharing(4, 6, 0, 2))
    assert share_workers(stream, None, 8, 4, begun)[0] == 6
    assert share_workers(stream, 0, 8, 1, begun)[0] == 0
    with pytest.raises(UserError, match="began with 4 processes"):
        share_workers(stream, None, 1, 3, begun)


def test_more_readers_than_shards(stream):
    assert share_workers(stream, None, 16, 2, None)[0] == 2
    with pytest.raises(UserError, match=r"5 shards cannot be shared by 3 workers of each of 2 .*2"):
        share_workers(stream, 3, 16, 2, None)
    with pytest.raises(UserError, match="5 shards cannot be shared by 6 processes"):
        share_workers(stream, None, 16, 6, None)


def test_names_of_shards(shards, monkeypatch):
    pytest.importorskip("braceexpand", reason="braceexpand is not installed")
    monkeypatch.setattr("hpm.data.streams.shards.MOST_SHARDS", 20)
    expected = [f"{shards}/s-{number}.tar" for number in range(5)]
    assert find_shards(f"{shards}/s-*.tar") == expected
    assert find_shards(f"{shards}/s-{{0..4}}.tar") == expected
    assert find_shards(f"{shards}/s-{{0,1}}.tar") == expected[:2]
    assert find_shards("http://x/s-{00..02}.tar")[-1] == "http://x/s-02.tar"
    for wrong, words in {
        f"{shards}/none-*.tar": "no shard matches",
        f"{shards}/s-{{0..5}}.tar": "s-5.tar: no such file",
        f"{shards}/s-{{0,0}}.tar": "named twice",
        "x-{0..99}.tar": "more than 20 shards",
        "http://x/s-*.tar": "does not list its files",
    }.items():
        with pytest.raises(UserError, match=words):
            find_shards(wrong)


def test_a_missing_library_for_braces(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(UserError, match=r"needs braceexpand: pip install 'hpm-vision\[stream\]'"):
        find_shards("x-{0..9}.tar")


def test_a_source_is_not_a_stream(shards):
    assert isinstance(open_data(f"{shards}/s-0.tar"), Stream)
    with pytest.raises(UserError, match="is a stream, which only hpm pretrain reads"):
        open_source("http://127.0.0.1/s-0.tar")
    with pytest.raises(UserError, match="not of videos"):
        open_data(f"{shards}/s-0.tar", clips=True)
    with pytest.raises(UserError, match="pass DATA yourself"):
        open_data("http://127.0.0.1/s.tar", trusted=False)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives(tmp_path, mode):
    path = write_tar(tmp_path / f"s.tar.{mode[2:]}", {"a.png": png(1)}, mode)
    assert [entry.data for entry in images_of(str(path))] == [png(1)]


def test_every_cut_of_an_archive_is_one_line(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{n}.png": png(n, 4) for n in range(4)})
    whole = path.read_bytes()
    used = 4 * 1024  # headers and images, before the end of the archive
    for length in [*range(0, used, 300), 512, 1024, 2048]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"damaged or cut off after \d image|not a tar"
        ) as error:
            list(images_of(str(path)))
        assert "\n" not in str(error.value)


def test_damage_in_the_middle_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{n}.png": png(n, 4) for n in range(4)})
    data = bytearray(path.read_bytes())
    data[1024:1200] = b"x" * 176  # the second header
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged or cut off after 1 image"):
        list(images_of(str(path)))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"../a.png": b""}, "leads out of the archive"),
        ({"/etc/a.png": b""}, "leads out of the archive"),
        ({"b/..\\..\\a.png": b""}, "leads out of the archive"),
        ({"a.json": b"", "b.txt": b""}, "no images .* but 1 .json, 1 .txt"),
        ({}, "no images"),
    ],
)
def test_archives_that_are_refused(tmp_path, files, words):
    path = write_tar(tmp_path / "s.tar", files)
    with pytest.raises(UserError, match=words):
        list(images_of(str(path)))


def test_links_in_an_archive_are_passed_over(tmp_path):
    """To a file of this machine, or of the archive."""
    (tmp_path / "secret.png").write_bytes(png(1))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(link)
        member = tarfile.TarInfo("a.png")
        member.size = len(png(0))
        archive.addfile(member, io.BytesIO(png(0)))
    assert [entry.name for entry in images_of(str(tmp_path / "s.tar"))] == ["a.png"]


def test_a_header_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("hpm.data.streams.archives.LARGEST_HEADER", 2000)
    path = write_tar(tmp_path / "s.tar", {"a.png": png(0, 4), f"{'long/' * 500}b.png": png(1, 4)})
    with pytest.raises(UserError, match=r"cut off after 1 image \(a header of 2\d+ bytes"):
        list(images_of(str(path)))


def test_what_is_no_archive(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"<html>no such page</html>" * 100)
    with pytest.raises(UserError, match="not a tar archive"):
        list(images_of(str(tmp_path / "s.tar")))


def test_an_image_that_is_too_large_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("hpm.data.streams.archives.LARGEST", 1000)
    path = write_tar(tmp_path / "s.tar", {"a.png": b"x" * 1001, "b.png": png(0, 4)})
    large, small = images_of(str(path))
    assert large.problem == "1001 bytes, more than 1000" and small.problem is None


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "reset", "stall"])
def test_a_fault_that_passes_is_not_seen(shards, monkeypatch, fault, ranges):
    no_waiting(monkeypatch, timeout=0.2 if fault == "stall" else 30.0)
    expected = list(images_of(f"{shards}/s-1.tar"))
    with serving(shards, ranges) as server:
        server.faults["s-1.tar"] = [fault, fault, fault]
        assert list(images_of(f"{server.url}/s-1.tar")) == expected
        assert len(server.requests) == 4
        assert (server.requests[-1][1] is not None) == (fault in ("cut", "reset"))


@pytest.mark.parametrize(
    ("faults", "words", "requests"),
    [
        ([404], "answers 404", 1),
        ([403], "answers 403", 1),
        ([500] * 9, r"answers 500 .*\(6 attempts\)", 6),
        (["stall"] * 9, r"timed out \(6 attempts\)", 6),
    ],
)
def test_a_fault_that_stays_is_one_line(shards, monkeypatch, faults, words, requests):
    no_waiting(monkeypatch, timeout=0.05 if "stall" in faults else 30.0)
    with serving(shards) as server:
        server.faults["s-1.tar"] = faults
        with pytest.raises(UserError, match=words):
            list(images_of(f"{server.url}/s-1.tar"))
        assert len(server.requests) == requests


def test_no_server(monkeypatch, tmp_path):
    no_waiting(monkeypatch)
    with serving(tmp_path) as server:
        url = server.url
    with pytest.raises(UserError, match=r"no connection: .*\(6 attempts\)"):
        list(images_of(f"{url}/s.tar"))


def test_a_file_system_that_fails_for_a_moment(shards, monkeypatch):
    """Opening and reading fail by turns; what was read before is not read again."""
    no_waiting(monkeypatch)
    expected, numbers = list(images_of(f"{shards}/s-1.tar")), itertools.count()

    class Stale(io.FileIO):
        def __init__(self, *arguments):
            self.fail()
            super().__init__(*arguments)

        def read(self, size):
            self.fail()
            return super().read(min(size, 1000))

        def fail(self):
            if next(numbers) % 5 == 0:
                raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(transport, "open", Stale, raising=False)
    assert list(images_of(f"{shards}/s-1.tar")) == expected
    assert next(numbers) > 20


def test_a_file_system_that_keeps_failing_is_one_line(shards, monkeypatch):
    def stale(*arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    no_waiting(monkeypatch)
    monkeypatch.setattr(transport, "open", stale, raising=False)
    with pytest.raises(UserError, match=r"s-1.tar: .*Stale file handle \(6 attempts\)"):
        list(images_of(f"{shards}/s-1.tar"))


def test_an_archive_that_is_short_on_the_server(shards, tmp_path):
    shutil.copy(shards / "s-0.tar", tmp_path / "s.tar")
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(data[:5000])
    with serving(tmp_path) as server, pytest.raises(UserError, match="damaged or cut off after"):
        list(images_of(f"{server.url}/s.tar"))


def test_formats_of_headers(tmp_path):
    """Long names have headers of their own; what lies between the images is skipped."""
    for number, style in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=style) as archive:
            for n in range(3):
                for name, data in (
                    (f"{'x' * 90}/{'y' * 90}{n}.png", png(n)),
                    ("a.json", b"{}" * n),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            folder = tarfile.TarInfo("folder.png")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        assert [entry.data for entry in images_of(str(path))] == [png(n) for n in range(3)]


def test_the_headers_of_archives_are_not_kept_while_they_are_listed(tmp_path):
    files = {f"class_{number % 7}/{number:05d}.png": b"" for number in range(4000)}
    archive = write_tar(tmp_path / "s.tar", files)
    tracemalloc.start()
    try:
        source = TarSource("s", [str(archive)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(source) == 4000 and len(source.classes) == 7
    assert peak < 500 * len(source), "bytes"


def test_one_process_opens_a_stream_for_all(shards, monkeypatch):
    """Servers are asked once for what all processes have to know."""
    data = f"{shards}/s-*.tar"
    stream = open_data(data)
    sent = [pickle.dumps((each, None)) for each in (stream, first_images(stream, 20))]
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_main", lambda _: pickle.loads(sent.pop(0)))
    monkeypatch.setattr(build, "open_data", lambda *_, **__: pytest.fail("it has opened the data"))
    images = build.open_images(PretrainConfig(data=data, out="unused", steps=10, holdout=2))
    assert images.stream is not stream and images.stream.shards == stream.shards
    assert len(images.held_out) == 2

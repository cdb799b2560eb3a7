"""Lists of millions of images are read as short ones are, in seconds and in little memory."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import write_images
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm.core.errors import UserError
from hpm.data import lists, long_lists
from hpm.data.fingerprint import fingerprint
from hpm.data.loader import StepSampler, training_loader, training_views
from hpm.data.sources import hold_out, open_source

FILES = ("a.png", "b c.JPG", "d/e.jpeg", "d/two words", "plain", "ä ö.webp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listed")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def all_are_long(monkeypatch):
    monkeypatch.setattr(lists, "MOST_CHECKED", 0)


def both_ways(path):
    """(short, long): what a list is read as, or why not."""
    found = []
    for most in (1000, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lists, "MOST_CHECKED", most)
            patch.setattr(long_lists, "BLOCK", 64)
            try:
                source = open_source(str(path)).train
            except UserError as error:
                found.append(re.sub(r"(, line \d+)|(: no such image: .*)", "", str(error)))
                continue
            labels = None if source.labels is None else source.labels.tolist()
            found.append((list(source.paths), labels, source.classes, fingerprint(source)))
    return found


def test_a_list_may_begin_with_a_byte_order_mark(folder):
    """Windows editors write one."""
    (folder / "list.txt").write_text("a.png 1\nd/e.jpeg 2\n", encoding="utf-8-sig")
    short, long = both_ways(folder / "list.txt")
    assert short == long
    assert short[0] == [str(folder / name) for name in ("a.png", "d/e.jpeg")]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("", "./", "d/../", "/")),
            st.sampled_from(FILES),
            st.sampled_from((" 3", " 12", "  cat", " a.b", " a_label_of_some_length")),
            st.sampled_from(("\n", "\r\n", " \n", "\n\n", "\n\t")),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(("", "all", "some")),
)
def test_read_as_a_short_list_is(folder, lines, labels):
    text = ""
    for number, (start, name, label, end) in enumerate(lines):
        label = label if labels == "all" or (labels and number % 2) else ""
        text += f"{folder}/{name}{label}{end}" if start == "/" else f"{start}{name}{label}{end}"
    path = folder / "list.txt"
    path.write_bytes(text.encode())
    short, long = both_ways(path)
    assert short == long


def test_an_image_that_is_missing(folder, all_are_long, monkeypatch):
    monkeypatch.setattr(lists, "MOST_CHECKED", 1)
    (folder / "list.txt").write_text("gone.png 1\n" + "a.png 1\n" * 9)
    with pytest.raises(UserError, match=rf"list.txt: no such image: {folder}/gone.png"):
        open_source(str(folder / "list.txt"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n\n", "the list is empty"),
        (b"a.png\nno such\n", "list.txt: no such image: no such"),
        (b"a.png " + b"x" * 200, "a label of 200 bytes, more than 128"),
        (b"a.png\n\xff\xfe.png\n", "nor a text list"),
        (b"a" * 3000, "a line of more than 1000 bytes"),
    ],
)
def test_what_is_refused(folder, content, words, all_are_long, monkeypatch):
    monkeypatch.setattr(long_lists, "BLOCK", 1000)
    (folder / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_source(str(folder / "list.txt"))


def memory(pid="self", name="smaps_rollup", field="Pss"):
    text = Path(f"/proc/{pid}/{name}").read_text()
    return int(re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE)[1]) << 10


PROGRAM = """
import json, sys
from test_long_lists import measure
print(json.dumps(measure(sys.argv[1])))
"""


def measure(path):
    """(seconds of the processor until the list is open, bytes of all processes at most) with two
    loading workers."""
    start = time.process_time()
    source = open_source(path).train
    seconds = time.process_time() - start
    assert len(source) == 10_000_000 and source.path(len(source) - 1).endswith("n99/199.png")
    assert source.labels[-1] == source.classes.index("99")
    fingerprint(source)
    kept, _ = hold_out(source, 128, 0)
    views = training_views(kept, (16, 16), 3, 0, (0.2, 1.0), True, 4)
    batches = iter(training_loader(kept, views, StepSampler(len(kept), 8, 20, 0), 2, False))
    for _ in range(20):
        assert len(next(batches).indices) == 8
        workers = [memory(child.pid) for child in multiprocessing.active_children()]
    return seconds, max(memory("self", "status", "VmHWM"), memory() + sum(workers))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
def test_ten_million_images(tmp_path):
    """The bound on time is of the processor, and thrice of what was measured."""
    (image,) = write_images(tmp_path / "one", 1, 1).rglob("*.png")
    for label in range(100):
        (tmp_path / f"n{label:02}").mkdir()
        for number in range(200):
            os.link(image, tmp_path / f"n{label:02}" / f"{number:03}.png")
    names = (f"n{d:02}/{n:03}.png {d}\n" for d in range(100) for n in range(200))
    with open(tmp_path / "list.txt", "w") as file:
        file.write("".join(names) * 500)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "list.txt"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    seconds, most = json.loads(done.stdout)
    print(f"{seconds:.1f} s of one core, {most / 1e6:.0f} MB")
    assert seconds < 10 and most < 1 << 30


def test_only_some_are_asked_for(folder, monkeypatch):
    """The others are found to be missing when they are read."""
    monkeypatch.setattr(lists, "MOST_CHECKED", 3)
    (folder / "list.txt").write_text("a.png 1\ngone.png 2\n" * 4 + "a.png 1\n")
    source = open_source(str(folder / "list.txt")).train
    assert len(source) == 9 and source.labels.tolist() == [0, 1] * 4 + [0]
    assert source.labels.dtype == np.int64

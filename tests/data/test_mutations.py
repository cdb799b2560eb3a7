"""Damaged, cut, empty and hostile files among the data: no crash, no hang, little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)
MOST_SECONDS, MOST_MEGABYTES = 20, 1500  # of one file


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    mutations.write_samples(folder)
    return folder


def run(folder, count, first=0, timeout=1000):
    """Read mutations in a process of its own: suffix -> what it cost."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", mutations.__file__, str(count), str(first), str(folder)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    current = (folder / "current").read_text()
    assert done.returncode == 0, f"mutation {current}: {done.returncode}\n{done.stderr[-3000:]}"
    found = {line["suffix"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert sum(each["files"] for each in found.values()) == count
    assert max(each["seconds"] for each in found.values()) < MOST_SECONDS
    assert max(each["megabytes"] for each in found.values()) < MOST_MEGABYTES
    assert 0 < sum(each["read"] for each in found.values()) < count
    return found


def test_three_hundred_mutations(samples):
    found = run(samples, 300, timeout=250)
    assert {".jpg", ".png", ".tif", ".webp", ".npy", ".mp4", ".tar"} <= found.keys()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_mutations(samples):
    print(json.dumps(run(samples, 10_000), indent=0))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_mutations_of_photographs_and_films(shared_data, tmp_path):
    """Of cameras and of encoders that are not those of the tests."""
    for kind in ("*.jpg", "*.png", "*.JPEG", "*.mp4"):
        for file in sorted(shared_data.rglob(kind))[:200:50]:
            shutil.copy(file, tmp_path / f"{file.parent.name}_{file.name}")
    assert len(list(tmp_path.iterdir())) > 8
    run(tmp_path, 2000)

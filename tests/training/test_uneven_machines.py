"""Two processes on machines that differ: one has fewer cores, the other little free memory."""

import pytest
from helpers import tiny_arguments
from jobs import torchrun
from shards import write_shards

import hpm
from hpm.core.config import PretrainConfig
from hpm.data.sources import open_data
from hpm.data.streams.head import EntrySource
from hpm.training import streams
from hpm.training.images import TrainingImages
from hpm.weights.checkpoint import load_checkpoint

PROGRAM = """
import os, sys
from hpm.data import cache, workers
cores, memory = (4, 1 << 34) if os.environ["RANK"] == "0" else (6, 1000)
workers.usable_cores = lambda: cores
cache.available_memory = lambda: memory
from hpm.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "uneven.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize(("rank", "cores"), [(0, 6), (1, 80)])
def test_a_stream_is_shared_the_same_way_everywhere(tmp_path, monkeypatch, rank, cores):
    """Else processes would read the same shards, and some shards would not be read."""
    stream = open_data(f"{write_shards(tmp_path)}/s-*.tar")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("hpm.data.workers.usable_cores", lambda: cores)
    monkeypatch.setattr(streams.distributed, "gather", lambda own: [own, 1])
    images = TrainingImages(EntrySource("s", [], []), None, False, {}, stream, 0)
    reading, _ = streams.begin_reading(PretrainConfig("s", "run"), images, None)
    assert reading.workers == reading.sharing.workers == 1


@pytest.mark.slow
def test_a_stream_on_uneven_machines(tmp_path, program):
    out = tmp_path / "run"
    arguments = tiny_arguments(holdout=4, shuffle=6)
    data = f"{write_shards(tmp_path)}/s-*.tar"
    result = torchrun(program, "pretrain", data, "--out", out, *arguments)
    assert result.returncode == 0, result.stderr
    saved = load_checkpoint(hpm.Run(out).latest_checkpoint()).meta["stream"]
    assert saved["cursors"].keys() == {str(lane) for lane in range(2 * saved["workers"])}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "false"])
def test_a_given_time_on_uneven_machines(image_folder, tmp_path, program, cache):
    """All time the same steps, or they would wait for each other for ever."""
    out = tmp_path / "run"
    arguments = [a for a in tiny_arguments() if not a.startswith(("--steps", "--workers"))]
    arguments += [f"--cache={cache}", "--max-hours=0.02"]
    result = torchrun(program, "pretrain", image_folder, "--out", out, *arguments)
    assert result.returncode == 0, result.stderr
    assert hpm.Run(out).latest_checkpoint() is not None

"""A run that is killed 25 times in a row, at random moments, ends with the weights of a run that
nobody touched."""

import json
from pathlib import Path

import kills
import pytest
import torch
from helpers import TINY
from shards import write_shards

import hpm
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]
KILLS = 25
OPTIONS = TINY | {
    "steps": 2 + KILLS * kills.MOST_SAVES,
    "checkpoint_every": "1 step",
    "log_every": 1,
    "workers": 1,
    "keep_checkpoints": 2,
}


@pytest.fixture(scope="module")
def data(image_folder, tmp_path_factory):
    shards = write_shards(tmp_path_factory.mktemp("shards"))
    return {"folder": str(image_folder), "stream": f"{shards}/*.tar"}


@pytest.mark.parametrize(
    ("kind", "changes", "processes"),
    [
        ("folder", {}, 1),
        ("stream", {"shuffle": 6, "workers": 2}, 1),
        ("folder", {"shard": True}, 2),
        ("stream", {"shard": True, "shuffle": 6}, 2),
    ],
)
def test_killed_25_times(kind, changes, processes, data, tmp_path):
    options = OPTIONS | changes | {"data": data[kind]}
    whole, out = tmp_path / "whole", tmp_path / "run"
    untouched = kills.start(options | {"out": str(whole)}, world_size=processes)
    assert kills.codes(untouched) == [0] * processes
    steps, left = [], 0
    for seed in range(KILLS):
        started = kills.start(options | {"out": str(out)}, seed, processes)
        codes = kills.codes(started)
        # Of two processes, one is killed, and the other loses it, or waits for it and is killed.
        assert -9 in codes and 0 not in codes, (seed, codes)
        found = list_checkpoints(out / "checkpoints")
        steps.append(load_checkpoint(found[-1]).meta["step"] if found else 0)
        left += bool([*(out / "checkpoints").glob(".*")])
    assert steps == sorted(steps) and 2 < steps[-1] < options["steps"], steps
    assert left, "no kill came while a checkpoint was written"
    last = kills.start(options | {"out": str(out)}, world_size=processes)
    assert kills.codes(last) == [0] * processes
    expected, found = (
        load_checkpoint(hpm.Run(folder).latest_checkpoint()) for folder in (whole, out)
    )
    for part in ("model", "teacher", "optimizer", "rng"):
        for name, tensor in getattr(expected, part).items():
            assert torch.equal(tensor, getattr(found, part)[name]), (part, name)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["step"] for line in lines]
    assert logged == sorted(set(logged)) and logged[-1] == options["steps"]
    assert not list((out / "checkpoints").glob(".*"))

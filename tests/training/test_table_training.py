"""Pre-training on tables and LitData: streams resume at the image where they stopped, each process
reads its own share, and what is read in any order has its memory of losses."""

from collections import Counter
from itertools import islice

import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments
from hub import hub_in_use
from litdata_folders import write_litdata
from shards import png, serving

import hpm
from hpm.data.sources import open_data
from hpm.data.streams.lanes import Lane
from hpm.weights.checkpoint import load_checkpoint

datasets = pytest.importorskip("datasets", reason="datasets is not installed")

COUNT = 60
OPTIONS = TINY | {"holdout": 4, "shuffle": 6, "workers": 2, "log_every": 1, "stream": True}
KINDS = ["hub", "parquet", "arrow", "litdata", "litdata on a server"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """DATA of each kind: the same images, each in several shards."""
    root = tmp_path_factory.mktemp("tables")
    samples = [{"image": png(n), "label": n % 3} for n in range(COUNT)]
    write_litdata(root / "litdata", samples, {"image": "jpeg", "label": "int"})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    rows = datasets.Dataset.from_list(
        [sample | {"image": {"bytes": sample["image"], "path": None}} for sample in samples],
        features=datasets.Features(features),
    )
    rows.save_to_disk(root / "arrow", num_shards=6)
    for folder in (root / "parquet", root / "hub" / "me" / "set"):
        folder.mkdir(parents=True)
        for number in range(2):
            part = rows.shard(2, number, contiguous=True)
            part.to_parquet(folder / f"train-{number}.parquet", batch_size=8)
    found = {kind: str(root / kind) for kind in ("parquet", "arrow", "litdata")}
    with (
        hub_in_use(root / "hub", root / "cache"),
        serving(root / "litdata") as server,
    ):
        yield found | {"hub": "hf://me/set", "litdata on a server": f"{server.url}/"}


def losses(run):
    found = {m["step"]: m for m in run.metrics() if "reconstruction_loss" in m}
    return [found[step]["reconstruction_loss"] for step in sorted(found)]


@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_a_stopped_run_resumes_at_the_image(places, tmp_path, monkeypatch, kind):
    """8 steps of 8 images are more than an epoch."""
    whole = hpm.pretrain(data=places[kind], out=str(tmp_path / "whole"), **OPTIONS)
    options = {"data": places[kind], "out": str(tmp_path / "run")} | OPTIONS
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(**options)
    run = hpm.pretrain(**options)
    assert losses(run) == losses(whole) and len(losses(run)) == 8
    first, second = (load_checkpoint(each.latest_checkpoint()) for each in (run, whole))
    for name, value in first.model.items():
        assert torch.equal(value, second.model[name]), name
    assert first.meta["stream"]["cursors"] == second.meta["stream"]["cursors"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_of_two_workers_read_each_image_once(places, kind):
    """Each of the four lanes reads its own shards, also when it goes on in the middle."""
    stream = open_data(places[kind], in_order=True)
    assert stream.repeatable and len(stream.shards) >= 6
    found = Counter()
    for number in range(4):
        lane = Lane(stream, number, 4, seed=0, block=5)
        reads = [(read, lane.cursor) for read in islice(lane, 40)]
        # So many that the first epoch is over for certain.
        while reads[-1][0].epoch == 0:
            reads.append((next(lane), lane.cursor))
        found += Counter(read.entry.data for read, _ in reads if read.epoch == 0)
        again = Lane(stream, number, 4, seed=0, block=5, cursor=reads[7][1])
        assert [r.entry for r in islice(again, 20)] == [r.entry for r, _ in reads[8:28]]
    assert found == Counter(png(n) for n in range(COUNT))


@pytest.mark.parametrize("kind", ["litdata", pytest.param("hub", marks=pytest.mark.slow)])
def test_what_is_read_in_any_order_remembers_losses(places, tmp_path, kind):
    changes = {"stream": False, "mine_by": "memory", "workers": 0, "steps": 12}
    run = hpm.pretrain(data=places[kind], out=str(tmp_path / "run"), **OPTIONS | changes)
    assert len(losses(run)) == 12
    result = run_here("eval", "knn", run.folder, places[kind], "--device", "cpu")
    assert result.returncode == 0, result.stderr


def test_a_stream_option_for_what_is_read_in_any_order_only(image_folder, tmp_path):
    arguments = ("pretrain", image_folder, "--out", tmp_path / "run", "--stream")
    assert_refused(run_here(*arguments, *tiny_arguments()), "leave it out for images that are read")


def test_a_stream_of_a_table_has_no_epochs(places, tmp_path):
    options = [a for a in tiny_arguments(steps=None) if not a.endswith("=None")]
    arguments = ("pretrain", places["parquet"], "--out", tmp_path / "run", "--stream")
    assert_refused(run_here(*arguments, *options), "pass --steps instead of --epochs")

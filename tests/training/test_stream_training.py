"""Pre-training on shards: it resumes at the image where it stopped, and refuses what needs an
index."""

import shutil

import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments
from jobs import torchrun
from shards import no_waiting, png, serving, write_shards, write_tar

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.options import make_config
from hpm.data.sources import open_data
from hpm.data.streams.head import EntrySource
from hpm.training.images import TrainingImages
from hpm.training.streams import begin_reading
from hpm.weights.checkpoint import load_checkpoint

OPTIONS = TINY | {"holdout": 4, "shuffle": 6, "workers": 2, "log_every": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run that was never stopped; 8 steps of 8 images are more than an epoch of 50."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return hpm.pretrain(data=f"{shards}/s-*.tar", out=str(out), **OPTIONS)


def losses(run):
    found = {m["step"]: m for m in run.metrics() if "reconstruction_loss" in m}
    return [found[step]["reconstruction_loss"] for step in sorted(found)]


def assert_same(run, other):
    assert losses(run) == losses(other)
    first, second = (load_checkpoint(each.latest_checkpoint()) for each in (run, other))
    for name, value in first.model.items():
        assert torch.equal(value, second.model[name]), name
    assert first.meta["stream"]["cursors"] == second.meta["stream"]["cursors"]


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow), 0])
def test_a_stopped_run_resumes_at_the_image(shards, whole, tmp_path, monkeypatch, workers):
    options = {"data": f"{shards}/s-*.tar", "out": str(tmp_path / "run")} | OPTIONS
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            hpm.pretrain(**options)
    assert_same(hpm.pretrain(**options | {"workers": workers}), whole)


def test_a_server_with_faults_gives_the_same_run(shards, whole, tmp_path, monkeypatch):
    no_waiting(monkeypatch)
    with serving(shards) as server:
        for number in range(4):
            server.faults[f"s-{number}.tar"] = [500, "cut"]
        data = f"{server.url}/s-{{0..3}}.tar"
        pytest.importorskip("braceexpand", reason="braceexpand is not installed")
        run = hpm.pretrain(data=data, out=str(tmp_path / "run"), **OPTIONS)
    assert losses(run) == losses(whole)


@pytest.mark.slow
def test_two_processes_resume_as_one(shards, tmp_path):
    """The lanes of two processes are read by one, in the same order."""
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["-m", "hpm", "pretrain", f"{shards}/s-*.tar", "--out"]
    more = tiny_arguments(holdout=4, shuffle=6, log_every=1, checkpoint_every="1 steps")
    ended = torchrun(*arguments, first, *more, "--keep-checkpoints=99")
    assert ended.returncode == 0, ended.stderr
    shutil.copytree(first, second)
    for file in sorted((second / "checkpoints").iterdir())[4:]:
        file.unlink()
    result = run_here("pretrain", f"{shards}/s-*.tar", "--out", second, *more)
    assert result.returncode == 0, result.stderr
    assert losses(hpm.Run(second)) == pytest.approx(losses(hpm.Run(first)), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_goes_on_with_its_own_lanes(rank, shards, monkeypatch):
    """Whoever kept those of another would write them, long out of date, into the next
    checkpoint."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    stream = open_data(f"{shards}/s-*.tar")
    images = EntrySource("s", [], [])
    images = TrainingImages(images, None, False, {}, stream, 0)
    config = make_config(PretrainConfig, {"data": "s", "out": "run", "workers": 2})
    saved = {
        "processes": 2,
        "workers": 2,
        "cursors": {str(lane): [lane, 0, 1] for lane in range(4)},
    }
    reading, _ = begin_reading(config, images, saved)
    assert reading.cursors == {lane: (lane, 0, 1) for lane in (2 * rank, 2 * rank + 1)}


def test_views_of_an_image_share_a_batch(shards, tmp_path):
    run = hpm.pretrain(
        data=f"{shards}/s-*.tar", out=str(tmp_path / "run"), repeat_augment=2, **OPTIONS
    )
    assert len(losses(run)) == 8


def test_files_that_are_no_images_are_passed_over(tmp_path):
    files = {f"{number}.png": png(number) for number in range(40)} | {"broken.png": b"no image"}
    write_tar(tmp_path / "s.tar", files)
    run = hpm.pretrain(
        data=str(tmp_path / "s.tar"), out=str(tmp_path / "run"), **OPTIONS | {"workers": 0}
    )
    log = (run.folder / "train.log").read_text()
    assert "cannot read" in log and "s.tar, image 40 (broken.png: cannot identify" in log


def test_nothing_but_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hpm.data.streams.loading.MOST_UNREADABLE", 10)
    files = {f"{number}.png": png(number) for number in range(2)}
    files |= {f"x{number}.png": b"no image" for number in range(20)}
    write_tar(tmp_path / "s.tar", files)
    result = run_here(
        "pretrain", tmp_path / "s.tar", "--out", tmp_path / "run", *tiny_arguments(holdout=0)
    )
    assert_refused(result, "10 images in a row cannot be read")


def test_damage_is_one_line_from_a_worker(shards, tmp_path):
    for number in range(2):
        data = (shards / f"s-{number}.tar").read_bytes()
        (tmp_path / f"s-{number}.tar").write_bytes(data if number == 0 else data[:9000])
    result = run_here(
        "pretrain",
        f"{tmp_path}/s-*.tar",
        "--out",
        tmp_path / "run",
        *tiny_arguments(holdout=0, workers=1, shuffle=4),
    )
    assert_refused(result, "s-1.tar: the archive is damaged or cut off after")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, ["pass --steps instead of --epochs"]),
        ({"mine_by": "memory"}, ["mine_by memory remembers each image"]),
        ({"mine_every": 2}, ["mine_every 2 remembers each image"]),
        ({"warmup": "2 epochs"}, ["pass warmup in steps or %"]),
        ({"hard_share_by": "epoch"}, ["leave hard_share_by epoch out"]),
        ({"cache": "true"}, ["cache true keeps all of them"]),
        ({"workers": 5}, ["4 shards cannot be shared by 5 workers: pass --workers 4"]),
    ],
)
def test_what_a_stream_does_not_have(shards, tmp_path, changes, words):
    arguments = [a for a in tiny_arguments(**changes) if not a.endswith("=None")]
    out = tmp_path / "run"
    assert_refused(run_here("pretrain", f"{shards}/s-*.tar", "--out", out, *arguments), *words)
    assert not out.exists()


def test_a_run_does_not_go_on_with_other_data(shards, whole, image_folder):
    options = OPTIONS | {"out": str(whole.folder)}
    with pytest.raises(hpm.UserError, match="is not a stream, but the run in .* began with one"):
        hpm.pretrain(data=str(image_folder), **options)
    with pytest.raises(hpm.UserError, match="their shards differ"):
        hpm.pretrain(data=f"{shards}/s-[012].tar", **options)


def test_evaluations_refuse_a_stream(whole):
    url = "http://127.0.0.1/s.tar"
    result = run_here("eval", "knn", whole.folder, url, "--device", "cpu")
    assert_refused(result, "is a stream, which only hpm pretrain reads")

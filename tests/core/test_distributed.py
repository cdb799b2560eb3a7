"""Two processes at the same global batch are one process, but for rounding."""

import json
import resource

import pytest
import torch
import torch.distributed as dist
from helpers import run_here, tiny_arguments, write_images
from jobs import hpm_on, torchrun

import hpm
from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.files import read_tensors
from hpm.core.signals import Interrupted
from hpm.data.sources import open_source
from hpm.models.architecture import resolve_model
from hpm.show.run import Run
from hpm.training.build import channel_statistics


def run_torchrun(*arguments, processes=2):
    return torchrun("-m", "hpm", *arguments, processes=processes)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reconstruction_loss" in line]


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    options = tiny_arguments(log_every=1, accumulate=2, base_lr=1e-3)
    for name, run in (("one", run_here), ("two", run_torchrun)):
        result = run("pretrain", image_folder, "--out", folder / name, *options)
        assert result.returncode == 0, result.stderr
    return folder


def test_two_processes_give_the_losses_of_one(runs):
    one, two = losses(runs / "one"), losses(runs / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        for name in ("reconstruction_loss", "predictor_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)
        assert a["hard_share"] == b["hard_share"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mine_by", ["memory", "progress"])
def test_two_processes_remember_what_one_does(mine_by, image_folder, tmp_path):
    options = tiny_arguments(log_every=1, accumulate=2, mine_by=mine_by, steps=12)
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        result = run_torchrun("pretrain", image_folder, "--out", out, *options, processes=processes)
        assert result.returncode == 0, result.stderr
        tensors, _ = read_tensors(Run(out).latest_checkpoint())
        memory = torch.cat([t for name, t in tensors.items() if name.startswith("memory.")])
        found.append((losses(out)[-1]["reconstruction_loss"], memory))
    (one, memory), (two, same_memory) = found
    assert two == pytest.approx(one, rel=1e-3)
    torch.testing.assert_close(same_memory, memory, atol=5e-3, rtol=5e-3)
    assert memory.abs().sum() > 0


def test_only_the_main_process_writes(runs):
    assert len(list((runs / "two").glob("events.*"))) == 1
    assert (runs / "two" / "train.log").read_text().count("resuming from") == 0
    assert (runs / "two" / "backbone.safetensors").exists()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(runs, image_folder):
    """A finished run stays finished, whoever asks."""
    before = (runs / "one" / "backbone.safetensors").stat().st_mtime_ns
    options = tiny_arguments(log_every=1, accumulate=2, base_lr=1e-3)
    result = run_torchrun("pretrain", image_folder, "--out", runs / "one", *options)
    assert result.returncode == 0, result.stderr
    assert "is already finished" in result.stderr
    assert (runs / "one" / "backbone.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("knn", ["--k=[1,5]"]),
        pytest.param("stats", [], marks=pytest.mark.slow),
        pytest.param("attentive", ["--epochs=2"], marks=pytest.mark.slow),
        pytest.param("attentive", ["--epochs=2", "--cache-gb=1e-9"], marks=pytest.mark.slow),
        pytest.param("linear", ["--epochs=3"], marks=pytest.mark.slow),
        pytest.param("linear", ["--epochs=3", "--augment"], marks=pytest.mark.slow),
        pytest.param("finetune", ["--epochs=2", "--batch-size=12"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_evaluate_as_one(runs, image_folder, tmp_path, protocol, options):
    """Exactly, but for fine-tuning, whose processes augment on their own."""
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = ["eval", protocol, runs / "one", image_folder, "--out", out, "--workers=0"]
        result = hpm_on(processes, *command, *options)
        assert result.returncode == 0, result.stderr
        (file,) = out.glob("*.json")
        found[processes] = json.loads(file.read_text())
    assert found[1]["values"].keys() == found[2]["values"].keys()
    assert found[1]["hardness"] == found[2]["hardness"]
    if protocol == "stats":
        assert close(found[1]["values"], found[2]["values"])
    elif protocol != "finetune":
        assert found[1]["values"] == found[2]["values"]


def close(one, two):
    """Whether nested numbers are the same but for rounding."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[name], two[name]) for name in one)
    return one == pytest.approx(two, rel=1e-4)


ROWS = """
import sys
import torch
import torch.distributed as dist
from hpm.core import distributed
from hpm.data.sources import open_source
from hpm.evals.features import ImageReader, extract

gather = dist.all_gather_object

def refuse(values, value):
    # Which images are unreadable is a few lines of text; rows are tensors.
    assert isinstance(value, dict) and all(isinstance(text, str) for text in value.values()), value
    gather(values, value)

images = sys.argv[1]
with distributed.process_group(torch.device("cpu")):
    rank = distributed.rank()
    dist.all_gather_object = refuse
    # 0 has rows 1 and 4, 1 has 0, 2 and 3; then 0 has none.
    ids = torch.tensor([[1, 4], [0, 2, 3]][rank])
    values = ids[:, None] * torch.tensor([1.0, 10.0])
    whole = torch.arange(5)[:, None] * torch.tensor([1.0, 10.0])
    assert torch.equal(distributed.rows_to_main(values, ids), whole if rank == 0 else values[:0])
    assert torch.equal(distributed.rows_of_all(ids), torch.tensor([1, 4, 0, 2, 3]))
    for empty in (0, 1):
        ids = torch.arange(0 if rank == empty else 3)
        assert torch.equal(distributed.rows_of_all(ids), torch.arange(3))
        found = distributed.rows_to_main(ids, ids)
        assert torch.equal(found, torch.arange(3 if rank == 0 else 0))
    assert len(distributed.rows_of_all(torch.empty(0, 4))) == 0

    source = open_source(images).train
    means = lambda views: {"mean": views.float().mean((2, 3))}
    found = extract(means, source, source.labels, (20, 20), 3, ImageReader(4, 0, print))
    if rank == 1:
        assert found == {}
    else:
        from hpm.data.loader import evaluation_batches
        (batch,) = evaluation_batches(source, (20, 20), 3, 100)
        assert torch.equal(found["mean"].features, means(batch.images)["mean"])
        assert found["mean"].labels.tolist() == [source.labels[i] for i in batch.indices]
        assert len(batch.images) == int(sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [(0, 2, 4)])
def test_features_travel_as_tensors_and_are_kept_once(tmp_path, broken):
    """Also where one of the processes can read no image at all."""
    images = write_images(tmp_path / "images", classes=1, per_class=5)
    for number in broken:
        (images / "class_0" / f"{number:03d}.png").write_bytes(b"broken")
    program = tmp_path / "program.py"
    program.write_text(ROWS)
    result = torchrun(program, images, 5 - len(broken))
    assert result.returncode == 0, result.stderr


def test_a_mistake_is_told_once(image_folder, tmp_path):
    options = tiny_arguments(batch_size=7)
    result = hpm_on(2, "pretrain", image_folder, "--out", tmp_path / "run", *options)
    assert result.returncode != 0
    assert result.stderr.count("hpm: error:") == 1
    assert "cannot be shared by 2 processes" in result.stderr


ONE_RANK_FAILS = """
import sys
from hpm import pretraining as module
from hpm.commands import cli
from hpm.core import distributed
from hpm.core.errors import UserError

def fail(run, *_):
    if distributed.rank() == 1 and run.step == 0:
        raise {error}
    return step(run, *_)

step = module.train_step
module.train_step = fail
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "UserError('the disk of this machine is full')",
            "rank 1: the disk of this machine is full",
        ),
        ("RuntimeError('a bug')", "RuntimeError: a bug"),
    ],
)
def test_an_error_on_another_rank_is_seen(error, line, image_folder, tmp_path):
    """Once, with its rank, and all processes end; nothing is said of the lost connection."""
    program = tmp_path / "program.py"
    program.write_text(ONE_RANK_FAILS.format(error=error))
    options = tiny_arguments()
    result = torchrun(program, "pretrain", image_folder, "--out", tmp_path / "run", *options)
    assert result.returncode != 0
    assert result.stderr.count(line) == 1, result.stderr
    assert "Connection closed" not in result.stderr and "connection" not in result.stderr.lower()


MAIN_ALONE = """
import sys, time
from datetime import timedelta
from hpm import pretraining as module
from hpm.commands import cli
from hpm.core import distributed

distributed.TIMEOUT = timedelta(seconds=20)

def slow(*_):
    if distributed.is_main():
        {what}

module.{function} = slow
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("function", ["picture_held_out", "evaluate", "refresh_report"])
def test_the_others_wait_for_what_the_main_process_does_alone(function, image_folder, tmp_path):
    """Longer than any exchange may take."""
    program = tmp_path / "program.py"
    program.write_text(MAIN_ALONE.format(function=function, what="time.sleep(30)"))
    options = tiny_arguments(checkpoint_every="100%", log_every=1)
    result = torchrun(program, "pretrain", image_folder, "--out", tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_main_process_that_dies_alone_ends_the_others(image_folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MAIN_ALONE.format(function="evaluate", what="raise RuntimeError('a bug')"))
    options = tiny_arguments()
    result = torchrun(program, "pretrain", image_folder, "--out", tmp_path / "run", *options)
    assert result.returncode != 0 and result.stderr.count("RuntimeError: a bug") == 1


def test_processes_join_with_their_gpu_and_a_limit(monkeypatch):
    """NCCL guesses a device that is not given, and a lost process is not waited for for ever."""
    joined, groups = {}, []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: joined.update(options))
    monkeypatch.setattr(dist, "new_group", lambda **options: groups.append(options))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "_store", None)
    device = torch.device("cuda", 1)
    with distributed.process_group(device):
        pass
    assert joined["device_id"] == device and joined["timeout"] == distributed.TIMEOUT
    # What the main process does alone is waited for on the CPU, which has no watchdog.
    assert groups == [{"backend": "gloo", "timeout": distributed.MAIN_TIMEOUT}]


def test_a_later_group_does_not_read_what_an_earlier_one_left_in_the_store(monkeypatch):
    """Such as its addresses: torchrun's store lives as long as the processes."""
    store, joined = dist.HashStore(), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *_, store, **__: joined.append(store.add("joined", 1))
    )
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "_store", None)
    for _ in range(2):
        with distributed.process_group(torch.device("cpu")):
            pass
    assert joined == [1, 1]


@pytest.mark.parametrize(
    ("device", "error", "destroyed"),
    [
        (torch.device("cuda", 1), RuntimeError("out of memory"), False),
        (torch.device("cuda", 1), Interrupted(15), True),  # of all processes
        (torch.device("cpu"), RuntimeError("a bug"), True),
    ],
)
def test_a_process_that_fails_on_a_gpu_does_not_wait_for_the_others(
    device, error, destroyed, monkeypatch
):
    """NCCL's connections end in all processes together, or not at all."""
    ended = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(distributed, "_store", None)
    monkeypatch.setattr(distributed, "reports_error", lambda: True)
    with pytest.raises(type(error)), distributed.process_group(device):
        raise error
    assert bool(ended) == destroyed


def test_apples_gpu_is_one_line_where_it_cannot_work(monkeypatch):
    with pytest.raises(hpm.UserError, match="pass --device cpu"):
        distributed.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.pick_device("mps").type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(hpm.UserError, match="one process only"):
        distributed.pick_device("mps")


def test_one_process_measures_the_channels_for_all(monkeypatch, image_folder):
    """The others would ask one file system for the same images."""
    measured = ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_main", lambda value: (measured, None))
    source = open_source(str(image_folder)).train
    config = PretrainConfig(data=str(image_folder), out="unused", normalize="measured")
    monkeypatch.setattr(source, "open", lambda index: pytest.fail("it has read an image"))
    assert channel_statistics(config, source, resolve_model(config)) == measured


def test_many_processes_may_open_a_connection_to_each_other_one(monkeypatch):
    """The limit of many systems is 1024 open files."""
    monkeypatch.setenv("WORLD_SIZE", "1024")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1024)]))
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_store", None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("the limit cannot be raised here")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        with distributed.process_group(torch.device("cpu")):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (4096, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
        with distributed.process_group(torch.device("cpu")):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(process))
        assert distributed.pick_device("auto") == torch.device("cuda", process)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(hpm.UserError, match="process 3 .* no GPU.*--nproc-per-node 2"):
        distributed.pick_device("auto")

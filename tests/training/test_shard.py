"""Sharded models (--shard) train as whole ones, and what they write fits any number of
processes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_refused, run_here, tiny_arguments
from jobs import TORCHRUN, Job, hpm_on, torchrun

import hpm
from hpm.core.files import read_meta
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = {"log_every": 1, "base_lr": 1e-3, "keep_checkpoints": 9, "holdout": 8}


def pretrain(images, out, processes=2, **changes):
    options = tiny_arguments(**OPTIONS | {"shard": True} | changes)
    result = hpm_on(processes, "pretrain", images, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return hpm.Run(out)


def assert_same_losses(run, other, from_step=1):
    one, two = (
        {line["step"]: line for line in r.metrics() if "grad_norm" in line} for r in (run, other)
    )
    assert one.keys() == two.keys() and max(one) >= 8
    for step in range(from_step, max(one) + 1):
        for name in ("reconstruction_loss", "predictor_loss", "grad_norm"):
            assert one[step][name] == pytest.approx(two[step][name], rel=2e-4), (step, name)


def assert_same_checkpoints(path, other):
    one, two = load_checkpoint(path), load_checkpoint(other)
    for part in ("model", "teacher", "optimizer", "rng"):
        assert getattr(one, part).keys() == getattr(two, part).keys()
        for name, tensor in getattr(one, part).items():
            if part != "rng":
                difference = (tensor - getattr(two, part)[name]).abs().max()
                assert difference < 1e-4, (part, name)
    ignored = {"config": None, "unreadable": None, "seconds": None}
    assert one.meta | ignored == two.meta | ignored


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return hpm.pretrain(str(image_folder), str(out), **TINY | OPTIONS)


@pytest.fixture(scope="module")
def sharded(image_folder, tmp_path_factory):
    """A run of two processes, each of which holds a shard of student and teacher."""
    return pretrain(image_folder, tmp_path_factory.mktemp("sharded") / "run")


def copied(run, folder):
    """A copy of a run as it was when its checkpoint of step 4 had been written."""
    shutil.copytree(run.folder, folder)
    for path in list_checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def test_the_losses_of_one_process(whole, sharded):
    assert_same_losses(whole, sharded)
    (one,), (two,) = (
        [line for line in run.metrics() if "held_out/reconstruction_loss" in line]
        for run in (whole, sharded)
    )
    assert two == pytest.approx(one, rel=1e-3)
    assert (sharded.folder / "figures" / "step_00000008.png").exists()
    assert "sharded over all processes" in (sharded.folder / "train.log").read_text()


def test_the_checkpoints_of_one_process(whole, sharded):
    """Each process has written a part, and one reads the whole."""
    names = [path.name for path in list_checkpoints(sharded.checkpoints)]
    assert names == ["step_00000004.sharded", "step_00000008.sharded"]
    for path, other in zip(
        list_checkpoints(sharded.checkpoints), list_checkpoints(whole.checkpoints)
    ):
        assert_same_checkpoints(path, other)
        sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
        assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
        assert not [file for file in path.iterdir() if file.suffix not in (".safetensors", ".json")]


def test_what_is_loaded_from_a_sharded_run(sharded):
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    latest = list_checkpoints(sharded.checkpoints)[-1]
    found = [hpm.load_encoder(p)(images)[0] for p in (sharded.folder, latest, sharded.backbone)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_one_process_goes_on(whole, sharded, image_folder, tmp_path):
    """With --shard and without, it is one whole model; its checkpoints are files again."""
    out = copied(sharded, tmp_path / "run")
    arguments = tiny_arguments(**OPTIONS | {"shard": True})
    result = run_here("pretrain", image_folder, "--out", out, *arguments)
    assert result.returncode == 0, result.stderr
    assert "not sharded: there is one process" in result.stderr
    assert "resuming from" in result.stderr and "step_00000004.sharded, step 4" in result.stderr
    assert_same_losses(whole, hpm.Run(out))
    assert list_checkpoints(out / "checkpoints")[-1].name == "step_00000008.safetensors"


KILLED = """
import os, signal, sys, time
from hpm.commands import cli
from hpm.weights import shard_writer

replace = shard_writer.replace_folder

def kill(temporary, path):
    if path.name == "step_00000008.sharded":
        os.kill(os.getpid(), signal.SIGKILL)  # everything is written but the name
    replace(temporary, path)

shard_writer.replace_folder = kill
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_loses_only_that(whole, image_folder, tmp_path):
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(KILLED)
    arguments = tiny_arguments(**OPTIONS | {"shard": True, "holdout": 8})
    result = torchrun(program, "pretrain", image_folder, "--out", out, *arguments)
    assert result.returncode != 0
    folder = out / "checkpoints"
    (saved,) = list_checkpoints(folder)
    assert saved.name == "step_00000004.sharded" and read_meta(saved)["step"] == 4
    assert [path for path in folder.iterdir() if path.name.startswith(".step_00000008")]
    result = run_here("pretrain", image_folder, "--out", out, *tiny_arguments(**OPTIONS))
    assert result.returncode == 0 and "step 4" in result.stderr, result.stderr
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert_same_losses(whole, hpm.Run(out))


FULL = """
import resource, sys
from hpm.commands import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # stands in for a full disk
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_disk_that_fills_up(image_folder, tmp_path):
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(FULL)
    arguments = tiny_arguments(**OPTIONS | {"shard": True, "holdout": 0})
    result = torchrun(program, "pretrain", image_folder, "--out", out, *arguments)
    assert result.returncode != 0
    assert result.stderr.count("hpm: error:") == 1
    assert "step_00000004.sharded could not be written: no space left" in result.stderr
    assert not list((out / "checkpoints").iterdir())


def test_a_damaged_checkpoint(sharded, tmp_path):
    latest = list_checkpoints(sharded.checkpoints)[-1]
    shard = "shard-00002-model-00001-of-00001.safetensors"
    for name, words in ((shard, f"{shard} is"), ("checkpoint.json", "checkpoint.json: truncated")):
        for change in ("truncated", "missing"):
            path = tmp_path / change / name / latest.name
            shutil.copytree(latest, path)
            file = path / name
            file.write_bytes(file.read_bytes()[:100]) if change == "truncated" else file.unlink()
            said = "no such file" if (name, change) == ("checkpoint.json", "missing") else words
            with pytest.raises(hpm.UserError, match=said):
                load_checkpoint(path)
    path = tmp_path / "same size" / latest.name
    shutil.copytree(latest, path)
    file = path / shard
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(hpm.UserError, match=f"{latest.name}: damaged"):
        load_checkpoint(path)


def test_options_that_do_not_fit(image_folder, tmp_path):
    for changes, words in (
        ({"shard_within": "node"}, "shard_within is node: pass --shard as well"),
        ({"shard": True, "compile": "true"}, "sharded models are not compiled"),
        ({"shard": True, "teacher_scale": 0.5}, "teacher_scale is 0.5"),
    ):
        arguments = tiny_arguments(**changes)
        result = run_here("pretrain", image_folder, "--out", tmp_path / "run", *arguments)
        assert_refused(result, words)


@pytest.mark.slow
def test_four_processes_then_two_then_one(whole, image_folder, tmp_path):
    """What four have written, two and one go on from."""
    four = pretrain(image_folder, tmp_path / "four", processes=4)
    assert_same_losses(whole, four)
    for path, other in zip(list_checkpoints(four.checkpoints), list_checkpoints(whole.checkpoints)):
        assert_same_checkpoints(path, other)
    out = copied(four, tmp_path / "two")
    assert_same_losses(whole, pretrain(image_folder, out, processes=2))
    out = copied(four, tmp_path / "one")
    hpm.pretrain(str(image_folder), str(out), **TINY | OPTIONS)
    assert_same_losses(whole, hpm.Run(out))


@pytest.mark.slow
def test_a_whole_run_goes_on_sharded(whole, image_folder, tmp_path):
    out = copied(whole, tmp_path / "run")
    assert_same_losses(whole, pretrain(image_folder, out))
    names = [path.name for path in list_checkpoints(out / "checkpoints")]
    assert names == ["step_00000004.safetensors", "step_00000008.sharded"]


@pytest.mark.slow
def test_shards_within_a_node(whole, image_folder, tmp_path, monkeypatch):
    """Two nodes of two processes: each has all shards, and the nodes average gradients."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "os.environ['LOCAL_WORLD_SIZE'] = '2'  # as on two nodes\n"
        "from hpm.commands import cli\n"
        "sys.exit(cli.main())\n"
    )
    out = tmp_path / "run"
    arguments = tiny_arguments(**OPTIONS | {"shard": True, "shard_within": "node"})
    result = torchrun(program, "pretrain", image_folder, "--out", out, *arguments, processes=4)
    assert result.returncode == 0, result.stderr
    assert_same_losses(whole, hpm.Run(out))
    assert_same_checkpoints(
        list_checkpoints(out / "checkpoints")[-1], list_checkpoints(whole.checkpoints)[-1]
    )
    assert "sharded over each node" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "checkpoint_activations": True},
        {"mask": "attention"},
        {"mine_by": "memory"},
        {"target": "teacher"},
        {"mask": "uniform"},
        {"predictor_dim": 16, "predictor_heads": 2, "teacher_view": "masked"},
    ],
)
def test_every_way_to_call_the_models(changes, image_folder, tmp_path):
    """Each is a call that must gather the weights that it uses."""
    one = hpm.pretrain(str(image_folder), str(tmp_path / "one"), **TINY | OPTIONS | changes)
    assert_same_losses(one, pretrain(image_folder, tmp_path / "two", **changes))


@pytest.mark.slow
def test_bfloat16(image_folder, tmp_path):
    one = hpm.pretrain(
        str(image_folder), str(tmp_path / "one"), **TINY | OPTIONS | {"precision": "bfloat16"}
    )
    two = pretrain(image_folder, tmp_path / "two", precision="bfloat16")
    for a, b in zip(one.metrics(), two.metrics()):
        if "grad_norm" in a:
            assert a["reconstruction_loss"] == pytest.approx(b["reconstruction_loss"], rel=1e-2)
    tensors = load_checkpoint(list_checkpoints(two.checkpoints)[-1]).model
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_weights_to_start_from(whole, image_folder, tmp_path):
    options = {"init": str(whole.folder)}
    one = hpm.pretrain(str(image_folder), str(tmp_path / "one"), **TINY | OPTIONS | options)
    assert_same_losses(one, pretrain(image_folder, tmp_path / "two", **options))


@pytest.mark.slow
def test_probes_and_their_best_checkpoint(image_folder, tmp_path):
    options = {"probe": str(image_folder), "probe_every": "2 steps", "steps": 8}
    run = pretrain(image_folder, tmp_path / "run", **options)
    best = run.best_checkpoint
    assert best.name == "best.sharded" and not list(run.checkpoints.glob(".*"))
    log = (run.folder / "train.log").read_text()
    assert f"at step {read_meta(best)['step']} ({best})" in log
    probed = [line["step"] for line in run.metrics() if "probe/linear" in line]
    assert probed == [2, 4, 6, 8]


@pytest.mark.slow
def test_a_prolonged_run(image_folder, tmp_path):
    """From before its cooldown; the losses are those of a run that was long from the start."""
    options = {"schedule": "constant", "cooldown": "2 steps", "warmup": "1 step"}
    options |= {"ema_horizon_end": "4 steps", "ema_ramp": "4 steps", "mask": "random"}
    options |= {"hard_share_start": None}
    run = pretrain(image_folder, tmp_path / "run", **options)
    assert run.before_cooldown.name == "before_cooldown.sharded"
    assert read_meta(run.before_cooldown)["step"] == 6
    prolonged = pretrain(image_folder, tmp_path / "run", **options | {"steps": 12})
    whole = TINY | OPTIONS | options | {"steps": 12}
    assert_same_losses(prolonged, hpm.pretrain(str(image_folder), str(tmp_path / "whole"), **whole))
    assert (run.checkpoints / "cooled_step_00000008.sharded").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("stop", [signal.SIGTERM, None])
def test_stopping(stop, image_folder, tmp_path):
    """By a signal, or because the time is up: the run waits until its checkpoint is written."""
    out = tmp_path / "run"
    options = {"shard": True, "steps": 4000, "checkpoint_every": "100%", "log_every": 1}
    options |= {} if stop else {"stop_after": "8s"}
    command = ("-m", "hpm", "pretrain", image_folder, "--out", out, *tiny_arguments(**options))
    run = Job(*TORCHRUN, 2, *command)
    try:
        metrics = out / "metrics.jsonl"
        run.wait_until(lambda: metrics.exists() and bool(metrics.read_text()))
        if stop:
            run.signal_all(stop)
        errors = run.errors()
        assert errors.count("stopped and saved") == 1 and run.all_gone(), errors
    finally:
        run.end()
    (saved,) = list_checkpoints(out / "checkpoints")
    assert saved.suffix == ".sharded"
    step = load_checkpoint(saved).meta["step"]
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert 0 < step == last < 4000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_again_and_again(image_folder, tmp_path):
    """At a random moment of a run that always writes checkpoints: there is always one to go on
    from, and it loads."""
    out, rng, steps = tmp_path / "run", torch.Generator().manual_seed(0), [0]
    options = {"shard": True, "steps": 100_000, "checkpoint_every": "1 step", "log_every": 1}
    command = ("-m", "hpm", "pretrain", image_folder, "--out", out, *tiny_arguments(**options))
    for _ in range(5):
        run = Job(*TORCHRUN, 2, *command)
        try:
            before = steps[-1]
            until = before + int(torch.randint(1, 12, (), generator=rng))

            def is_there(until=until):
                found = list_checkpoints(out / "checkpoints")
                return bool(found) and int(found[-1].stem[5:]) >= until

            run.wait_until(is_there)
            for pid in run.members():
                os.kill(pid, signal.SIGKILL)
        finally:
            run.end()
        latest = list_checkpoints(out / "checkpoints")[-1]
        steps.append(load_checkpoint(latest).meta["step"])
        assert steps[-1] >= until

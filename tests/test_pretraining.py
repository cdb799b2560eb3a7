import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import TINY, run_here, stop_after, tiny_arguments, write_images
from safetensors.torch import load_file

import hpm
from hpm.core import signals as stop
from hpm.core.errors import UserError
from hpm.core.files import read_tensors
from hpm.data.sources import open_source
from hpm.evals.loss_maps import evaluate_losses
from hpm.mining import miner
from hpm.mining.teacher import predicted_losses
from hpm.training.schedule import default_base_lr
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint
from hpm.weights.resolve import load


def pretrain(folder, out, **changes):
    return hpm.pretrain(data=str(folder), out=str(out), **TINY | changes)


def final(run):
    return load_checkpoint(run.latest_checkpoint())


def assert_same_weights(a, b):
    for part in ("model", "teacher", "optimizer"):
        first, second = getattr(a, part), getattr(b, part)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), (part, name)


def test_the_run_folder_may_be_in_the_home_folder(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = pretrain(image_folder, "~/runs/first", steps=1)
    assert run.folder == tmp_path / "runs" / "first"
    assert (run.folder / "backbone.safetensors").is_file()


def test_the_run_folder(finished_run):
    folder = finished_run.folder
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "checkpoints",
        "figures",
        "backbone.safetensors",
        "backbone.json",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    text = (folder / "config.yaml").read_text()
    assert yaml.safe_load(text)["patch_size"] == [4, 4] and "# command:" in text
    assert "\n# precision: float32\n" in text
    assert [p.name for p in finished_run.figures.iterdir()] == ["step_00000008.png"]
    metrics = finished_run.metrics()
    assert [m["step"] for m in metrics if "reconstruction_loss" in m] == [2, 4, 6, 8]
    last = metrics[-1]
    assert 0 <= last["held_out/ranking_accuracy"] <= 1
    assert -1 <= last["held_out/rank_correlation"] <= 1
    first = metrics[0]
    assert {
        "predictor_loss",
        "ranking_accuracy",
        "grad_norm",
        "learning_rate",
        "hard_share",
        "images_per_second",
        "data_wait",
        "memory_gb",
    } <= set(first)


def test_the_backbone_is_the_encoder(finished_run):
    encoder = hpm.load_encoder(finished_run.folder)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pooled, patches = encoder(images)
    assert pooled.shape == (2, 96) and patches.shape == (2, 16, 96)
    torch.testing.assert_close(pooled, patches.mean(1))
    normalized = (images / 255 - encoder.mean.view(3, 1, 1)) / encoder.std.view(3, 1, 1)
    torch.testing.assert_close(encoder(normalized)[0], pooled)
    from_file = hpm.load_encoder(finished_run.backbone)
    torch.testing.assert_close(from_file(images)[0], pooled, rtol=0, atol=0)
    about = json.loads(finished_run.backbone.with_suffix(".json").read_text())
    assert about["image_size"] == [16, 16] and len(about["mean"]) == 3
    names = set(load_file(finished_run.backbone))
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "norm.weight",
    } <= names


def test_what_is_not_as_asked_for_is_in_the_log(image_folder, tmp_path):
    """Fewer images held out than asked for, a warm-up that does not end."""
    options = TINY | {"steps": 1, "warmup": "2 epochs", "holdout": 128}
    run = hpm.pretrain(data=str(image_folder), out=str(tmp_path / "run"), **options)
    log = (run.folder / "train.log").read_text()
    assert "44 images of" in log and "1 step of 8 images" in log and "1 process, into" in log
    assert "4 held out (--holdout is 128, but at most a tenth is held out)" in log
    assert "warning: the warm-up of 2 epochs takes 10 steps, but the training has 1" in log


def test_loss_falls(image_folder, tmp_path):
    run = pretrain(image_folder, tmp_path / "run", steps=60, log_every=10)
    losses = [m["reconstruction_loss"] for m in run.metrics() if "reconstruction_loss" in m]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stopped_at", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resuming_is_bitwise_the_same(image_folder, tmp_path, monkeypatch, stopped_at):
    """An epoch has 5 steps: both stops are in the middle of one, the first not at a reading."""
    options = {"steps": 12, "accumulate": 2, "checkpoint_every": f"{stopped_at} steps"}
    torch.manual_seed(1)
    whole = pretrain(image_folder, tmp_path / "whole", **options)
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        stop_after(patch, stopped_at)
        with pytest.raises(KeyboardInterrupt):
            pretrain(image_folder, tmp_path / "stopped", **options)
    torch.manual_seed(2)  # whatever the state of the new process is
    resumed = pretrain(image_folder, tmp_path / "stopped", **options)
    assert_same_weights(final(whole), final(resumed))
    assert torch.equal(final(whole).rng["cpu"], final(resumed).rng["cpu"])
    steps = [m["step"] for m in resumed.metrics() if "reconstruction_loss" in m]
    assert steps == sorted(set(steps))


def test_a_run_keeps_the_learning_rate_that_it_began_with(image_folder, tmp_path, monkeypatch):
    """1.5e-4 was the default of earlier versions: their interrupted runs go on."""
    began = {"steps": 8, "base_lr": 1.5e-4}
    whole = pretrain(image_folder, tmp_path / "whole", **began)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pretrain(image_folder, tmp_path / "stopped", **began)
    resumed = pretrain(image_folder, tmp_path / "stopped", **began | {"base_lr": None})
    assert final(resumed).meta["config"]["base_lr"] == 1.5e-4
    assert_same_weights(final(whole), final(resumed))
    # A run that is begun without a learning rate records which it took, and says that it is short.
    fresh = pretrain(image_folder, tmp_path / "fresh", steps=2, base_lr=None)
    assert f"\n# base_lr: {default_base_lr(2, 8)}\n" in fresh.config_file.read_text()
    log = (fresh.folder / "train.log").read_text()
    assert log.count("2 steps is a short training") == 1
    assert (
        "short training"
        not in (resumed.folder / "train.log").read_text().partition("resuming from")[2]
    )


def test_the_held_out_loss_does_not_depend_on_what_is_mined(finished_run, image_folder):
    """The same weights on the same images: of the same masks, whatever the run's own are."""
    trained, source = load(finished_run.folder), open_source(str(image_folder)).train
    losses = set()
    for mask in ("easy_to_hard", "hardest", "block"):
        trained.config, trained.miner = dataclasses.replace(trained.config, mask=mask), None
        losses.add(evaluate_losses(trained, source, torch.device("cpu"))["reconstruction_loss"])
    assert len(losses) == 1 and losses.pop() > 0
    logged = [m for m in finished_run.metrics() if "held_out/reconstruction_loss" in m]
    assert logged and all(m["held_out/reconstruction_loss"] > 0 for m in logged)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(image_folder, tmp_path):
    options = {"steps": 60, "checkpoint_every": "100%", "eval_every": "100%", "log_every": 1}
    arguments = [
        sys.executable,
        "-m",
        "hpm",
        "pretrain",
        str(image_folder),
        "--out",
        str(tmp_path / "run"),
        *tiny_arguments(**options),
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped and saved; run the same command again" in errors
    (stopped,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert 0 < load_checkpoint(stopped).meta["step"] < 60
    again = run_here(*arguments[3:])
    assert again.returncode == 0 and "resuming from" in again.stderr
    whole = pretrain(image_folder, tmp_path / "whole", **options)
    assert_same_weights(final(whole), final(hpm.Run(tmp_path / "run")))


def test_a_finished_run_is_not_overwritten(finished_run, image_folder):
    def contents():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in finished_run.folder.rglob("*.safetensors")
        }

    before = contents()
    pretrain(image_folder, finished_run.folder, holdout=8)
    assert contents() == before
    with pytest.raises(hpm.UserError, match="another run: there steps is 8, here 7"):
        pretrain(image_folder, finished_run.folder, steps=7, holdout=8)
    assert contents() == before


@pytest.mark.parametrize(
    ("options", "has_predictor"),
    [
        ({"mask": "random", "predictor_loss": "none"}, False),
        ({"mask": "random"}, True),
        ({"predictor_loss": "absolute"}, True),
        ({"target": "pixels", "channels": 1, "image_size": (16, 24), "patch_size": (4, 8)}, True),
        ({"normalize": "imagenet", "precision": "bfloat16"}, True),
    ],
)
def test_baselines_and_variants(image_folder, tmp_path, options, has_predictor):
    run = pretrain(image_folder, tmp_path / "run", **options)
    metrics = [m for m in run.metrics() if "reconstruction_loss" in m]
    assert all(math.isfinite(m["reconstruction_loss"]) for m in metrics)
    assert ("predictor_loss" in metrics[0]) == has_predictor
    assert (metrics[-1]["hard_share"] > 0) == (options.get("mask") != "random")
    assert (any("predictor" in name for name in final(run).model)) == has_predictor


def test_accumulation_changes_nothing_but_rounding(image_folder, tmp_path):
    whole = pretrain(image_folder, tmp_path / "whole", mask="random")
    parts = pretrain(image_folder, tmp_path / "parts", mask="random", accumulate=4)
    for a, b in zip(whole.metrics(), parts.metrics(), strict=True):
        if "reconstruction_loss" in a:
            assert a["reconstruction_loss"] == pytest.approx(b["reconstruction_loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_teacher_is_not_run_while_its_result_is_not_used(image_folder, tmp_path, monkeypatch):
    calls = []
    looked = predicted_losses
    monkeypatch.setattr(miner, "predicted_losses", lambda *x: calls.append(1) or looked(*x))
    pretrain(image_folder, tmp_path / "random", mask="random", holdout=0)
    assert not calls
    # int(12 hidden x alpha) is 0 in the first 3 of 24 steps, where alpha is below 1/12.
    options = {"steps": None, "epochs": 4, "hard_share_start": 0.0, "holdout": 0}
    pretrain(image_folder, tmp_path / "hard", **options)
    assert len(calls) == 21


def test_starting_from_other_weights(finished_run, image_folder, tmp_path):
    run = pretrain(image_folder, tmp_path / "whole", init=str(finished_run.folder), base_lr=0.0)
    start, end = final(finished_run).model, final(run).model
    for name, tensor in start.items():
        assert torch.equal(tensor, end[name]), name
    assert "tensors matched" in (run.folder / "train.log").read_text()
    with pytest.raises(hpm.UserError, match="pass --init-partial"):
        pretrain(image_folder, tmp_path / "partial", init=str(finished_run.backbone))
    run = pretrain(
        image_folder, tmp_path / "allowed", init=str(finished_run.backbone), init_partial=True
    )
    assert "54 of" in (run.folder / "train.log").read_text()


def test_unreadable_images_are_counted_and_survive_a_restart(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", per_class=12)
    for name in ("class_0/003.png", "class_1/007.png"):
        (images / name).write_bytes(b"broken")
    options = {"holdout": 0, "log_every": 1}
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pretrain(images, tmp_path / "run", **options)
    run = pretrain(images, tmp_path / "run", **options)
    log = (run.folder / "train.log").read_text()
    assert log.count("cannot read") == 2 and "003.png" in log and "007.png" in log
    assert run.metrics()[-1]["unreadable"] == 2
    assert len(final(run).meta["unreadable"]) == 2
    with pytest.raises(hpm.UserError, match="images cannot be read, more than max_unreadable 0.01"):
        pretrain(images, tmp_path / "strict", max_unreadable=0.01, **options)


def test_unreadable_held_out_images_are_named_once(tmp_path):
    images = write_images(tmp_path / "images" / "train", per_class=8)
    held_out = write_images(tmp_path / "images" / "val", per_class=2)
    (held_out / "class_0" / "000.png").write_bytes(b"no image")
    run = pretrain(images.parent, tmp_path / "run", eval_every="50%", holdout=8)
    log = (run.folder / "train.log").read_text()
    assert log.count("cannot read") == 1 and "val/class_0/000.png" in log


def test_data_that_changed_under_a_run(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", per_class=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pretrain(images, tmp_path / "run", holdout=0)
    (images / "class_0" / "000.png").unlink()
    with pytest.raises(hpm.UserError, match="23 training images, but the run began with 24"):
        pretrain(images, tmp_path / "run", holdout=0)


def test_python_options_are_checked(tmp_path):
    with pytest.raises(hpm.UserError, match="option 'mask_rato'; did you mean 'mask_ratio'"):
        hpm.pretrain(data="demo", out=str(tmp_path), mask_rato=0.5)
    with pytest.raises(hpm.UserError, match="mask_ratio cannot be 'high'"):
        hpm.pretrain(data="demo", out=str(tmp_path), mask_ratio="high")
    with pytest.raises(hpm.UserError, match="out"):
        hpm.pretrain(data="demo")
    assert os.listdir(tmp_path) == []


def test_a_log_that_cannot_be_written_does_not_stop_training(image_folder, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr("hpm.training.log.open", fail, raising=False)
    run = pretrain(image_folder, tmp_path / "run")
    assert run.backbone.exists() and not (run.folder / "metrics.jsonl").exists()


def test_interrupted_is_told_apart(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(stop.Stop, "received", signal.SIGTERM)
    with pytest.raises(hpm.Interrupted) as stopped:
        pretrain(image_folder, tmp_path / "run")
    assert stopped.value.signal_number == signal.SIGTERM
    assert final(hpm.Run(tmp_path / "run")).meta["step"] == 1


def test_pretraining_on_the_command_line(image_folder, tmp_path):
    result = run_here(
        "pretrain", image_folder, "--out", tmp_path / "run", "--config", "demo", *tiny_arguments()
    )
    assert result.returncode == 0, result.stderr
    assert "hpm.load_encoder" in result.stderr and "step 8/8" in result.stderr


def test_a_probe_while_training(tmp_path, image_folder):
    """Logged beside the loss; the best checkpoint is kept, not pruned, and judged without the
    test split."""
    options = TINY | {"steps": 8, "keep_checkpoints": 1}
    run = hpm.pretrain(
        data=str(image_folder),
        out=str(tmp_path / "run"),
        probe=str(image_folder),
        probe_every="2 steps",
        **options,
    )
    probes = [line for line in run.metrics() if "probe/knn" in line]
    assert [line["step"] for line in probes] == [2, 4, 6, 8]
    for line in probes:
        assert 0 <= line["probe/knn"] <= 100 and 0 <= line["probe/linear"] <= 100
        assert line["probe/seconds"] > 0
    best = max(probes, key=lambda line: line["probe/linear"])  # the first of equals
    _, meta = read_tensors(run.best_checkpoint)
    assert meta["step"] == best["step"]
    assert meta["best_probe"]["linear"] == best["probe/linear"]
    assert len(list(run.checkpoints.iterdir())) == 2
    log = (run.folder / "train.log").read_text()
    assert "best probe: linear" in log and "s in all" in log
    # A probe changes nothing of what is learned.
    plain = hpm.pretrain(data=str(image_folder), out=str(tmp_path / "plain"), **options)
    one, two = (read_tensors(r.backbone)[0] for r in (run, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_probes(tmp_path, image_folder):
    def refused(words, probe):
        with pytest.raises(hpm.UserError, match=words):
            hpm.pretrain(data=str(image_folder), out=str(tmp_path / "r"), probe=probe, **TINY)

    refused("the images have no labels", str(image_folder / "class_0"))
    refused("no such folder", str(tmp_path / "none"))
    few = write_images(tmp_path / "few", classes=2, per_class=4)
    refused("leaves 4 images to learn from", str(few))
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_probe_sees_no_image_that_an_evaluation_tests_on(image_folder):
    """Also where the data has no test split, and the evaluation makes one."""
    from hpm.data.sources import open_source
    from hpm.evals.features import labelled_splits
    from hpm.evals.ongoing import OngoingProbe

    tested = labelled_splits(open_source(str(image_folder)), 0).test
    seen = OngoingProbe(str(image_folder), 0, 0).data
    paths = {s.path(i) for s in (seen.train, seen.test) for i in range(len(s))}
    assert not paths & {tested.path(i) for i in range(len(tested))}


def test_what_a_probe_cannot_read_is_said_once_and_bounded(tmp_path):
    images = write_images(tmp_path / "images", classes=2, per_class=40)
    labelled = write_images(tmp_path / "labelled", classes=2, per_class=40)
    broken = sorted(labelled.rglob("*.png"))[::20]
    for path in broken:
        path.write_bytes(b"broken")
    options = {"probe": str(labelled), "probe_every": "4 steps"}
    run = pretrain(images, tmp_path / "run", max_unreadable=0.5, **options)
    log = (run.folder / "train.log").read_text()
    seen = [path for path in broken if f"cannot read {path}" in log]
    assert seen and log.count("cannot read") == len(seen)
    with pytest.raises(UserError, match="images cannot be read, more than max_unreadable 0.01"):
        pretrain(images, tmp_path / "strict", max_unreadable=0.01, **options)


@pytest.mark.parametrize("mine_by", ["teacher", "memory"])
def test_repeated_views_get_masks_of_their_own(image_folder, tmp_path, mine_by, monkeypatch):
    pretraining = sys.modules["hpm.pretraining"]
    seen = []
    train_step = pretraining.train_step

    def watched(run, batch, *rest):
        result = train_step(run, batch, *rest)
        seen.append((batch, result))
        return result

    monkeypatch.setattr(pretraining, "train_step", watched)
    options = TINY | {"steps": 4, "checkpoint_every": "100%", "accumulate": 2}
    hpm.pretrain(
        data=str(image_folder),
        out=str(tmp_path / "run"),
        repeat_augment=2,
        mine_by=mine_by,
        **options,
    )
    for batch, result in seen:
        assert torch.equal(batch.indices[0::2], batch.indices[1::2])
        hidden = result.tensors["hidden_ids"].sort(1).values
        assert not (hidden[0::2] == hidden[1::2]).all(1).any()
    with pytest.raises(UserError, match="repeat_augment 3 does not divide batch_size 8"):
        hpm.pretrain(data=str(image_folder), out=str(tmp_path / "b"), repeat_augment=3, **options)
    with pytest.raises(UserError, match="repeat_augment 8"):
        hpm.pretrain(data=str(image_folder), out=str(tmp_path / "b"), repeat_augment=8, **options)

"""Runs that start from other weights with new decoders: a frozen encoder, then layer decay."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from helpers import TINY, assert_refused, run_here, stop_after, tiny_arguments
from jobs import torchrun

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.files import read_meta, read_tensors, write_tensors
from hpm.core.options import make_config
from hpm.models.mim import MaskedImageModel
from hpm.models.vit import VisionTransformer
from hpm.training.build import build_run, continues
from hpm.training.first_lines import continued_training, few_for_random_weights
from hpm.training.optim import adamw, scale_encoder
from hpm.training.schedule import (
    make_schedule,
    resolve,
)
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint
from hpm.weights.run_folder import KEPT_OPTIONS, RunFolder

CPU = torch.device("cpu")
OPTIONS = TINY | {"log_every": 1, "keep_checkpoints": 9, "checkpoint_every": "2 steps"}
CONTINUED = OPTIONS | {"init_partial": True, "freeze_encoder": "4 steps", "accumulate": 2}


def checkpoint(run, step):
    (path,) = [p for p in list_checkpoints(run.checkpoints) if p.stem == f"step_{step:08d}"]
    return load_checkpoint(path)


def under(prefix, state):
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def continued(finished_run, image_folder, tmp_path_factory):
    """A run from a backbone, frozen for half of its 8 steps."""
    out = tmp_path_factory.mktemp("continued") / "run"
    return hpm.pretrain(str(image_folder), str(out), init=str(finished_run.backbone), **CONTINUED)


def test_a_frozen_encoder_does_not_change(continued, finished_run):
    """In student and teacher, while the decoders learn. Then it is trained."""
    first, _ = read_tensors(finished_run.backbone)
    before, after = checkpoint(continued, 2), checkpoint(continued, 4)
    for frozen in (before, after):
        for part in (frozen.model, frozen.teacher):
            assert same(under("encoder.", part), first)
        assert not under("encoder.", frozen.optimizer)  # no moments of random decoders
    for part in ("decoder_embed.", "reconstructor.", "predictor."):
        for one, other in ((before.model, after.model), (before.teacher, after.teacher)):
            assert not same(under(part, one), under(part, other))
    trained = checkpoint(continued, 8)
    for part in (trained.model, trained.teacher):
        changed = under("encoder.", part)
        fixed = [name for name, tensor in changed.items() if torch.equal(tensor, first[name])]
        assert fixed == ["pos_embed"]


def test_what_the_first_lines_say(continued):
    log = (continued.folder / "train.log").read_text()
    line = "encoder: frozen for 4 steps (--freeze-encoder), learning rate times 0.75 from block to "
    assert log.count(line + "block below (--layer-decay)\n") == 1
    assert "from random weights" not in log
    config = PretrainConfig("photos", "out", steps=1000, batch_size=64)
    resolved = resolve(config, 1000, CPU, 1, continued=True)
    (line,) = continued_training(resolved, make_schedule(resolved, 1000))
    assert "frozen for 100 steps" in line
    scratch = resolve(config, 1000, CPU, 1)
    assert continued_training(scratch, make_schedule(scratch, 1000)) == []


def test_a_stopped_run_goes_on_exactly(
    continued, finished_run, image_folder, tmp_path, monkeypatch
):
    """In the middle of the freeze and after it; the weights to start from are not needed again."""
    init = tmp_path / "backbone.safetensors"
    init.write_bytes(finished_run.backbone.read_bytes())
    given = CONTINUED | {"data": str(image_folder), "out": str(tmp_path / "run")}
    given |= {"init": str(init)}
    for stop in (2, 6):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                hpm.pretrain(**given)
        init.unlink(missing_ok=True)
    run = hpm.pretrain(**given)
    one, other = checkpoint(run, 8), checkpoint(continued, 8)
    for part in ("model", "teacher", "optimizer", "rng"):
        assert same(getattr(one, part), getattr(other, part)), part


def test_a_prolonged_run_is_not_frozen_again(continued, finished_run, image_folder, tmp_path):
    out = shutil.copytree(continued.folder, tmp_path / "run")
    given = CONTINUED | {"data": str(image_folder), "out": str(out), "steps": 100}
    given |= {"init": str(finished_run.backbone)}
    run = build_run(make_config(PretrainConfig, given), CPU)
    assert (run.step, run.schedule.total, run.schedule.freeze) == (8, 100, 4)
    assert run.schedule.encoder_share(8) == 1


def test_the_encoder_warms_up_after_the_freeze():
    config = PretrainConfig("demo", "out", steps=100, warmup="10%", freeze_encoder="20 steps")
    schedule = make_schedule(resolve(config, 1000, CPU, 1), 1000)
    shares = [schedule.encoder_share(step) for step in (0, 19, 20, 24, 29, 30, 99)]
    assert shares == [0, 0, 0.1, 0.5, 1, 1, 1]
    unfrozen = dataclasses.replace(config, freeze_encoder=None)
    never = make_schedule(resolve(unfrozen, 1000, CPU, 1), 1000)
    assert [never.encoder_share(step) for step in (0, 50)] == [1, 1]


def test_layer_decay_is_that_of_a_naive_optimiser():
    """One AdamW per parameter, with the rate that its name says."""
    torch.manual_seed(0)
    model = MaskedImageModel(VisionTransformer((16, 16), (4, 4), 3, 32, 3, 2), 16, 1, 2)
    naive = copy.deepcopy(model)
    optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.05, layer_decay=0.5, freezes=True)
    powers = {"blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 0}
    single = {}
    for name, parameter in naive.named_parameters():
        if parameter.requires_grad:
            inside = name.startswith("encoder.")
            tokens = name.startswith("encoder.cls_token")
            decay = 0.05 if parameter.ndim > 1 and not tokens else 0.0
            found = [p for n, p in powers.items() if name.startswith(f"encoder.{n}.")]
            rate = 0.5 ** (found or [4])[0] if inside else 1.0
            adam = torch.optim.AdamW([parameter], betas=(0.9, 0.95), weight_decay=decay, fused=True)
            single[name] = (parameter, adam, rate, inside)
    for rate, share in ((1e-2, 0.0), (2e-2, 0.5), (1e-2, 1.0)):
        parameters = dict(model.named_parameters())
        for name, (parameter, adam, scale, inside) in single.items():
            parameter.grad = torch.randn_like(parameter)
            parameters[name].grad = parameter.grad.clone()
            adam.param_groups[0]["lr"] = rate * scale * (share if inside else 1)
            if share or not inside:
                adam.step()
        scale_encoder(optimizer, share)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        for name, (parameter, *_) in single.items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"init": "run"}, False),  # a whole run
        ({"init": "run", "init_teacher": True}, False),
        ({"init": "run", "predictor_loss": "none", "mask": "random"}, False),
        ({"init": "run", "decoder_dim": 64}, True),  # of another width
        ({"init": "run", "predictor_dim": 64}, True),
        ({"init": "backbone"}, True),
        ({"pretrained": True, "model": "timm/vit_tiny_patch16_224"}, True),
    ],
)
def test_when_a_decoder_is_new(options, expected, finished_run):
    paths = {"run": finished_run.folder, "backbone": finished_run.backbone}
    if "init" in options:
        options = options | {"init": str(paths[options["init"]])}
    assert continues(make_config(PretrainConfig, TINY | {"data": "x", "out": "y"} | options)) is (
        expected
    )


def test_the_defaults():
    config = PretrainConfig("demo", "out", steps=1000, batch_size=64)
    scratch, continued = (resolve(config, 1000, CPU, 1, each) for each in (False, True))
    assert (scratch.freeze_encoder, scratch.layer_decay, scratch.base_lr) == ("0%", 1, 4.7e-3)
    assert (continued.freeze_encoder, continued.layer_decay) == ("10%", 0.75)
    assert continued.base_lr == scratch.base_lr  # which the new decoder needs
    given = dataclasses.replace(config, freeze_encoder="5%", layer_decay=1.0, base_lr=1e-3)
    assert resolve(given, 1000, CPU, 1, continued=True) == resolve(given, 1000, CPU, 1)


def test_a_run_from_nothing_is_as_before(finished_run, image_folder, tmp_path):
    """Bit by bit as with the optimiser of runs that have neither freeze nor layer decay."""
    config = read_meta(finished_run.latest_checkpoint())["config"]
    assert (config["freeze_encoder"], config["layer_decay"]) == ("0%", 1.0)
    given = {"freeze_encoder": "0 steps", "layer_decay": 1, "holdout": 8}
    run = hpm.pretrain(str(image_folder), str(tmp_path / "run"), **TINY | given)
    one, other = (load_checkpoint(each.latest_checkpoint()) for each in (run, finished_run))
    for part in ("model", "teacher", "optimizer"):
        assert same(getattr(one, part), getattr(other, part))
    groups = build_run(make_config(PretrainConfig, config), CPU).optimizer.param_groups
    assert len(groups) == 2 and "lr_scale" not in groups[0]


def test_a_run_of_an_older_version_goes_on_as_it_began(continued, tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.kept_options() == {}
    tensors, meta = read_tensors(list_checkpoints(continued.checkpoints)[0])
    for name in KEPT_OPTIONS:
        del meta["config"][name]
    folder.checkpoints.mkdir()
    write_tensors(folder.checkpoints / "step_00000004.safetensors", tensors, meta)
    folder.config_file.write_text("base_lr: 0.003\nlayer_decay: 0.9\n")
    assert folder.kept_options() == {"base_lr": 0.003, "freeze_encoder": "0%", "layer_decay": 0.9}
    assert KEPT_OPTIONS["layer_decay"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze_encoder": "10%"}, "freeze_encoder is 10%, but the encoder starts from random"),
        ({"freeze_encoder": "10"}, "--freeze-encoder: '10' is not a duration"),
        ({"layer_decay": 1.5}, "--layer-decay is 1.5; it must lie between 0 and 1"),
        ({"layer_decay": 0}, "--layer-decay is 0; it must lie between 0 and 1"),
        ({"freeze_encoder": "8 steps", "init": "RUN"}, "leaves no step of 8 that trains the"),
        ({"freeze_encoder": "100%", "init": "RUN"}, "pass a shorter one"),
        ({"init_partial": True}, "init_partial is true, but init is not given: pass --init"),
        ({"init_teacher": True}, "init_teacher is true, but init is not given: pass --init"),
        ({"init": "nowhere.pth"}, "nowhere.pth: no such file"),
    ],
)
def test_mistakes(options, words, finished_run, image_folder, tmp_path):
    given = {n: str(finished_run.folder) if v == "RUN" else v for n, v in options.items()}
    out = tmp_path / "run"
    result = run_here("pretrain", image_folder, "--out", out, *tiny_arguments(**given))
    assert_refused(result, words)
    assert not out.exists()


def test_few_images_from_random_weights():
    def lines(count, **options):
        return few_for_random_weights(PretrainConfig("photos", "out", **options), count)

    (line,) = lines(3000)
    assert "3000 images to train on from random weights" in line and "--pretrained)" in line
    assert "timm" not in lines(3000, frames=16)[0]
    assert lines(100_000) == lines(None) == lines(3000, init="x") == []
    assert lines(3000, pretrained=True) == []
    assert few_for_random_weights(PretrainConfig("demo", "out"), 3000) == []


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_several_processes(shard, continued, finished_run, image_folder, tmp_path):
    """They compute the losses of one, and freeze the encoder as exactly."""
    out = tmp_path / "run"
    arguments = tiny_arguments(**CONTINUED | {"init": finished_run.backbone, "shard": shard})
    result = torchrun("-m", "hpm", "pretrain", image_folder, "--out", out, *arguments, processes=2)
    assert result.returncode == 0, result.stderr
    run = hpm.Run(out)
    one, two = (
        [line for line in each.metrics() if "grad_norm" in line] for each in (run, continued)
    )
    assert len(one) == len(two) == 8
    for mine, theirs in zip(one, two, strict=True):
        for name in ("reconstruction_loss", "predictor_loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4), json.dumps(mine)
    first, _ = read_tensors(finished_run.backbone)
    for step, frozen in ((4, True), (8, False)):
        found = checkpoint(run, step)
        assert read_meta(found.path)["freeze"] == 4
        for part in (found.model, found.teacher):
            assert same(under("encoder.", part), first) is frozen

"""What a program that calls hpm may count on."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.files import read_tensors
from hpm.core.options import make_config
from hpm.evals import detect, finetune, knn, segment


def test_pretrain_takes_the_data_first(image_folder, tmp_path):
    run = hpm.pretrain(image_folder, out=tmp_path / "run", **TINY | {"steps": 1})
    config = yaml.safe_load(run.config_file.read_text())
    assert config["data"] == str(image_folder) and config["out"] == str(tmp_path / "run")
    # From a preset, also where it is named by a path.
    preset = tmp_path / "mine.yaml"
    preset.write_text(yaml.safe_dump(TINY | {"steps": 1, "data": str(image_folder)}))
    run = hpm.pretrain(out=tmp_path / "other", config=preset)
    assert run.folder == tmp_path / "other" and run.backbone.exists()


def test_a_path_is_taken_wherever_a_name_is(finished_run, image_folder, tmp_path):
    config = make_config(
        PretrainConfig,
        {name: tmp_path / name for name in ("data", "out", "init", "probe", "codebook")},
    )
    assert config.data == str(tmp_path / "data") and config.init == str(tmp_path / "init")
    assert config.probe == str(tmp_path / "probe") and config.codebook.endswith("codebook")
    with pytest.raises(hpm.UserError, match="steps cannot be"):
        make_config(PretrainConfig, {"data": "x", "out": "y", "steps": tmp_path})
    options = {"k": (1,), "baselines": False, "compare": finished_run.backbone}
    preset = tmp_path / "knn.yaml"
    preset.write_text("temperature: 0.1\n")
    result = hpm.evaluate(
        "knn",
        finished_run.folder,
        image_folder,
        out=tmp_path / "evals",
        config=preset,
        test=image_folder,
        **options,
    )
    assert result.file.parent == tmp_path / "evals" and result.about["temperature"] == 0.1
    written = hpm.export(finished_run.folder, "safetensors", out=tmp_path / "a.safetensors")
    hpm.load_encoder(written)


RANDOM_STATE = """
import random, sys
from pathlib import Path
import numpy as np
import torch
import hpm

run, data, out = map(Path, sys.argv[1:])
tiny = dict(model="vit_nano", image_size=16, patch_size=4, batch_size=8, decoder_dim=32,
            decoder_depth=1, workers=0, holdout=8, log_every=1, checkpoint_every="2 steps")

def interrupted():
    save = PretrainingRun.save
    def save_and_stop(run):
        save(run)
        os.kill(os.getpid(), signal.SIGTERM)
    PretrainingRun.save = save_and_stop
    try:
        hpm.pretrain(data, out=out / "run", steps=6, **tiny)
    except hpm.Interrupted:
        pass
    PretrainingRun.save = save

seeds = lambda: (random.seed(3), np.random.seed(4), torch.manual_seed(5))
drawn = lambda: (random.random(), np.random.random(), torch.rand(1).item())
seeds()
expected = drawn()
seeds()
hpm.pretrain  # imported here
assert drawn() == expected, "the import"
import os, signal
from hpm.training.run import PretrainingRun
calls = {
    "an interrupted run": interrupted,
    "going on": lambda: hpm.pretrain(data, out=out / "run", steps=6, **tiny),
    "knn": lambda: hpm.evaluate("knn", run, data, out=out, k=(1,), workers=0),
    "load_encoder": lambda: hpm.load_encoder(run, image_size=32),
    "export": lambda: hpm.export(run, "safetensors", out / "a.safetensors"),
}
changed = []
for name, call in calls.items():
    seeds()
    call()
    if drawn() != expected:
        changed.append(name)
assert not changed, changed
assert "resuming from" in (out / "run" / "train.log").read_text()
"""


@pytest.mark.slow
def test_the_random_state_of_the_caller_is_left_alone(finished_run, image_folder, tmp_path):
    """In a process of its own: the type checks of the tests draw from Python's generator."""
    arguments = map(str, (finished_run.folder, image_folder, tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", RANDOM_STATE, *arguments],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("mask_ratio", "high", "it must be a number"),
        ("steps", 1.5, "it must be a whole number"),
        ("seed", True, "it must be a whole number"),
        ("init_partial", "yes", "it must be true or false"),
        ("image_size", "wide", r"it must be a whole number or a list such as \[1, 2\]"),
        ("betas", (0.9,), r"it must be a list such as \[1, 2\]"),
        ("warmup", 5, "it must be text"),
    ],
)
def test_an_option_of_another_type_is_told_which_it_must_be(option, value, reason):
    with pytest.raises(hpm.UserError, match=f"{option} cannot be .*: {reason}"):
        make_config(PretrainConfig, {"data": "x", "out": "y", option: value})


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (PretrainConfig, {"out": "y"}),
        (finetune.Options, {"run": "x"}),
        (detect.Options, {"run": "x"}),
        (segment.Options, {"run": "x"}),
    ],
)
def test_betas_that_the_optimiser_refuses(options, given):
    for betas in ("0.9,1.0", "-0.1,0.9"):
        with pytest.raises(hpm.UserError, match=r"betas is .*; it must lie between 0 and 1"):
            make_config(options, {"data": "x", "betas": betas} | given)


@pytest.mark.parametrize("name", ["eval_every", "probe_every", "checkpoint_every"])
def test_an_interval_of_zero_is_refused(name):
    """It would be every step, where a user may mean never."""
    for zero in ("0%", "0 steps", "0.0 epochs"):
        with pytest.raises(hpm.UserError, match=f"{name} is {zero}; pass '1 step' for every"):
            make_config(PretrainConfig, {"data": "x", "out": "y", name: zero})
    assert make_config(PretrainConfig, {"data": "x", "out": "y", "warmup": "0 steps"})


def test_a_list_of_any_length():
    with pytest.raises(hpm.UserError, match="k cannot be '5': it must be a list"):
        make_config(knn.Options, {"run": "x", "data": "y", "k": 5})


def test_errors_give_their_reasons(finished_run, tmp_path):
    """What the reader of a damaged file said, in the line and as the exception's cause."""
    folder = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    (folder / "config.yaml").write_text("data: [1,\n")
    with pytest.raises(hpm.UserError, match=r"config.yaml is damaged \(.*line 2") as damaged:
        hpm.pretrain("demo", out=folder, **TINY)
    assert isinstance(damaged.value.__cause__, yaml.YAMLError)
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {}, "code": Path("x")}, file)
    with pytest.raises(hpm.UserError, match=r"pickled code.*pathlib") as refused:
        read_tensors(file)
    assert refused.value.__cause__ is not None
    (tmp_path / "dataset_dict.json").write_text('{"splits"')
    from hpm.data.sources import _open_saved

    with pytest.raises(hpm.UserError, match=r"has no splits \(.*delimiter"):
        _open_saved(tmp_path)
    from hpm.core.hub import read_json

    with pytest.raises(hpm.UserError, match=r"is damaged \(.*delimiter"):
        read_json(tmp_path / "dataset_dict.json")
    with pytest.raises(hpm.UserError, match=r"cannot be read \(.*expected"):
        from hpm.commands.ablation_plan import _read_yaml

        _read_yaml("--vary", "[1, 2")


def test_a_system_that_it_does_not_run_on():
    program = "import sys; sys.platform = 'win32'; import hpm"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].endswith("on Windows, install it in WSL 2")

"""`hpm ray VERB` and `hpm slurm VERB` take the options of the verb, and hand on all of them."""

import dataclasses
import sys

import pytest
from helpers import assert_refused, run_here

import hpm
from hpm.commands.cli import understand
from hpm.commands.cluster_options import of_verb, pairs
from hpm.commands.embedding_options import EmbedConfig
from hpm.commands.options import PrepareConfig
from hpm.core.config import PretrainConfig


@pytest.mark.parametrize(
    ("words", "cls"),
    [
        (("pretrain", "photos", "--out=run", "--mask=block", "--workers=3"), PretrainConfig),
        (("embed", "run", "photos", "--dtype=float16", "--patches"), EmbedConfig),
        (("prepare", "photos", "--out=small", "--size=99"), PrepareConfig),
    ],
)
@pytest.mark.parametrize("cluster", [("ray", "--processes=2"), ("slurm", "--nodes=2")])
def test_options_reach_the_verb(words, cls, cluster):
    name, extra = cluster
    if (name, cls) == ("slurm", PrepareConfig):
        with pytest.raises(hpm.UserError, match="no verb 'prepare'"):
            understand([name, *words, extra])
        return
    there, here = understand([name, *words, extra])[1], understand([*words])[1]
    assert of_verb(there, cls) == here
    assert len(dataclasses.fields(there)) > len(dataclasses.fields(here))


def test_options_of_sbatch():
    assert pairs(("account=vision", "constraint=a=b")) == {"account": "vision", "constraint": "a=b"}
    with pytest.raises(hpm.UserError, match="sbatch is 'account': write it as name=value"):
        pairs(("account",))


def test_what_is_missing_is_named(image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    command = ("pretrain", image_folder, "--out", tmp_path / "run")
    assert_refused(run_here("ray", *command), "hpm ray needs ray: pip install 'hpm-vision[ray]'")
    assert_refused(run_here("slurm", *command), "hpm slurm needs submitit", "'hpm-vision[slurm]'")
    small = ("prepare", image_folder, "--out", tmp_path / "small", "--workers", 2)
    assert_refused(run_here("ray", *small), "on Ray, pass --processes instead")

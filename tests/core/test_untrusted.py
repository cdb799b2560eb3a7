"""A file of weights, which may come from anyone, fetches nothing and opens no data of its own."""

import json
import shutil
import socket

import pytest
import torch
from helpers import assert_refused, run_here, tiny_arguments

import hpm
from hpm.core.extras import need
from hpm.core.files import read_tensors, write_tensors
from hpm.core.plugins import import_plugin
from hpm.show import view
from hpm.show.command import show
from hpm.show.options import ShowConfig, ViewConfig
from hpm.targets.codebook import load_codebook
from hpm.targets.frozen_model import load_frozen
from hpm.weights.resolve import load

NAMES = (
    ("timm/vit_tiny_patch16_224", "timm.create_model.'vit_tiny_patch16_224', pretrained=True"),
    ("hf/nobody/nothing", "hf download nobody/nothing"),
)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def connect(*arguments, **options):
        raise AssertionError("the network was asked")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("hpm.core.hub._reachable", connect)
    monkeypatch.setattr(torch.hub, "download_url_to_file", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def checkpoint(finished_run, tmp_path):
    """A checkpoint whose config has these options."""

    def write(**options):
        tensors, meta = read_tensors(finished_run.latest_checkpoint())
        path = tmp_path / "step_00000008.safetensors"
        write_tensors(path, tensors, meta | {"config": meta["config"] | options})
        return str(path)

    return write


def codebook(path, of):
    about = {"kind": "hpm codebook", "of": of, "channels": 3, "patch_size": [4, 4]}
    write_tensors(path, {"codes": torch.zeros(4, 8)}, about)
    return str(path)


@pytest.mark.parametrize(("name", "command"), NAMES)
@pytest.mark.parametrize("by_codebook", [False, True])
def test_what_a_checkpoint_names_is_not_fetched(
    name, command, by_codebook, checkpoint, image_folder, tmp_path, no_network, capsys
):
    if by_codebook:
        named = codebook(tmp_path / "codes.safetensors", name)
        path = checkpoint(target="tokens", codebook=named)
    else:
        path = checkpoint(target="frozen", target_model=name)
    show(ShowConfig(path, str(image_folder), str(tmp_path / "fig.png"), images=2, device="cpu"))
    said = capsys.readouterr().out
    assert "what only a file names is not downloaded: download it with" in said
    assert said.count("\n") == 1
    with pytest.raises(hpm.UserError, match=f"is not on disk.*download it with.*{command}"):
        hpm.evaluate("hardness", path, str(image_folder), workers=0, device="cpu")
    trained = view.open_trained(path, "cpu")
    viewer = view.Viewer(trained, *view._examples("demo", trained), 2)
    assert "not downloaded" in viewer.page() and "error" not in viewer.answer({"example": "0"}, b"")
    hpm.export(path, to="safetensors", out=str(tmp_path / "out.safetensors"))


def test_weights_that_are_no_part_of_the_hub(monkeypatch, no_network):
    """timm fetches those by an address of their own."""
    timm = need("timm", "timm", "the test")
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    config.hf_hub_id, config.url = None, "https://example.org/weights.pth"
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
    with pytest.raises(hpm.UserError, match="not on disk"):
        load_frozen("timm/vit_tiny_patch16_224", fetch=False)


def test_an_encoder_of_timm_in_a_checkpoint_needs_no_pretrained_weights(
    finished_run, image_folder, tmp_path, no_network
):
    options = {"model": "timm/vit_tiny_patch16_224", "pretrained": True}
    tensors, meta = read_tensors(finished_run.latest_checkpoint())
    path = tmp_path / "step_00000008.safetensors"
    architecture = meta["architecture"] | {"model": options["model"]}
    write_tensors(
        path, tensors, meta | {"config": meta["config"] | options, "architecture": architecture}
    )
    with pytest.raises(hpm.UserError, match="another architecture"):  # built, and not fetched
        load(path)


def test_a_codebook_of_a_model_that_is_not_here(tmp_path, no_network):
    path = codebook(tmp_path / "codes.safetensors", "hf/nobody/nothing")
    with pytest.raises(hpm.UserError, match="hf download nobody/nothing"):
        load_codebook(path)


def test_view_opens_the_data_of_a_run_folder_alone(finished_run, checkpoint, image_folder):
    path = checkpoint(data=str(image_folder))
    assert view._examples(ViewConfig(path).data, load(path))[1][0].startswith("demo/")
    assert str(image_folder) in view._examples(None, load(finished_run.folder))[1][0]


def test_code_of_strangers_is_not_run(tmp_path, no_network, monkeypatch):
    """Else transformers would ask, on the terminal, whether to run what the folder holds."""
    folder = tmp_path / "model"
    folder.mkdir()
    about = {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    monkeypatch.setattr("hpm.core.hub._reachable", lambda address: False)
    with pytest.raises(hpm.UserError):
        load_frozen(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_mask_that_a_checkpoint_names_is_not_imported(
    checkpoint, image_folder, tmp_path, monkeypatch
):
    """As targets and encoders are not: importing it would run its code."""
    (tmp_path / "strangers.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from hpm.mining.strategies import random as priority\n"
    )
    monkeypatch.chdir(tmp_path)
    path = checkpoint(mask="strangers:priority", hard_share_start=None)
    figure = str(tmp_path / "figure.png")
    for use in (
        lambda: show(ShowConfig(path, str(image_folder), figure, images=2, device="cpu")),
        lambda: hpm.evaluate("hardness", path, str(image_folder), workers=0, device="cpu"),
        lambda: view.Viewer(view.open_trained(path, "cpu"), *view._examples("demo", load(path)), 2),
    ):
        try:
            use()  # panels that need the mask may be left out
        except hpm.UserError as error:
            assert "module that a file names is not imported" in str(error)
        assert not (tmp_path / "ran").exists()
    hpm.export(path, to="safetensors", out=str(tmp_path / "out.safetensors"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(hpm.UserError, match="hpm --import strangers"):
        load(path).find_miner()
    import_plugin("the test", "strangers")
    show(ShowConfig(path, str(image_folder), figure, images=2, device="cpu"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["a config", "a run folder"])
def test_yaml_makes_no_objects(where, finished_run, image_folder, tmp_path):
    text = f"data: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\n"
    if where == "a config":
        (tmp_path / "config.yaml").write_text(text)
        command = ("--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
    else:
        shutil.copytree(finished_run.folder, tmp_path / "run")
        (tmp_path / "run" / "config.yaml").write_text(text)
        command = (image_folder, "--out", tmp_path / "run", *tiny_arguments(holdout=8))
    assert_refused(run_here("pretrain", *command), "config.yaml")
    assert not (tmp_path / "ran").exists()

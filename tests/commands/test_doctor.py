"""`hpm doctor`."""

import io
import json
import os
import types

import pytest
import torch
from helpers import assert_refused, run_here
from rich.console import Console

from hpm.commands import doctor
from hpm.data import workers


def found(subject):
    return next(each for each in doctor.diagnose() if each.subject == subject)


def test_on_the_command_line(tmp_path):
    result = run_here("doctor", "--json", tmp_path / "found.json")
    assert result.returncode == 0 and "JPEG decoder" in result.stdout
    findings = json.loads((tmp_path / "found.json").read_text())
    subjects = [each["subject"] for each in findings]
    assert {"hpm", "torch", "processor", "extra dense"} <= set(subjects)
    assert len(subjects) == len(set(subjects))


def test_where_the_json_goes(tmp_path, monkeypatch):
    """A missing folder is made; what cannot be written is refused in one line."""
    monkeypatch.setattr(doctor, "diagnose", lambda: [doctor.Finding("hpm", "ok", "1")])
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (tmp_path / "new/folder/found.json", "~/home/found.json"):
        assert run_here("doctor", "--json", file).returncode == 0
    for folder in ("new/folder", "home"):
        (finding,) = json.loads((tmp_path / folder / "found.json").read_text())
        assert finding["subject"] == "hpm"
    reader, writer = os.pipe()
    assert run_here("doctor", "--json", f"/dev/fd/{writer}").returncode == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert json.load(pipe) == [finding]
    assert_refused(run_here("doctor", "--json", tmp_path / "new"), f"{tmp_path}/new could not be")


def test_the_gpu_of_a_mac(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("GPU").state == "warning"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    gpu = found("GPU")
    assert gpu.state == "ok" and gpu.found.startswith("Apple GPU") and "--device mps" in gpu.remedy


def test_every_extra_is_described():
    wanted = doctor._requirements()
    assert set(doctor.EXTRAS) == set(wanted) - {"dev"}
    assert "timm" in wanted["dense"] and not any("hpm" in name for name in wanted["dense"])


def test_which_decoder_of_videos(monkeypatch):
    assert found("video decoder").found.startswith("PyAV ")
    monkeypatch.setenv("HPM_VIDEO_DECODER", "opencv")
    refused = found("video decoder")
    assert refused.state == "missing" and "write auto, pyav, torchcodec" in refused.found


def test_a_missing_extra_names_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "timm")
    extra = found("extra finetune")
    assert extra.state == "missing" and "timm" in extra.found
    assert extra.remedy == "pip install 'hpm-vision[finetune]'"
    console = Console(file=io.StringIO(), width=120)
    doctor.print_findings([extra], console)
    assert "pip install 'hpm-vision[finetune]'" in console.file.getvalue()


@pytest.mark.parametrize(("total", "state"), [(64 * 2**20, "warning"), (8 * 2**30, "ok")])
def test_little_shared_memory(total, state, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SHARED", tmp_path)
    usage = types.SimpleNamespace(total=total)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    shared = found("shared memory")
    assert shared.state == state and ("--shm-size" in shared.remedy) == (state == "warning")


def test_no_name_of_an_extra_is_cut_off():
    page = io.StringIO()
    doctor.print_findings(
        [
            doctor.Finding(
                "extra multichannel", "missing", "x " * 60, "pip install 'hpm-vision[multichannel]'"
            )
        ],
        Console(file=page, width=80),
    )
    assert "'hpm-vision[multichannel]'" in page.getvalue()

"""What a machine without a compiler does."""

import pytest
import torch
from helpers import run_here, tiny_arguments

from hpm.core.config import PretrainConfig
from hpm.training.compiling import compiles, describe_uncompiled

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)


def config(compile):
    return PretrainConfig(data="demo", out="run", compile=compile)


def test_a_compiler_that_is_asked_for_is_missing(no_compiler, image_folder, tmp_path):
    arguments = tiny_arguments(steps=2, compile="true")
    result = run_here("pretrain", image_folder, "--out", tmp_path / "run", *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "there is no compiler: install g++" in result.stderr


def test_without_a_compiler_a_gpu_trains_uncompiled(no_compiler):
    assert not compiles(config("auto"), GPU)
    assert "no C compiler" in describe_uncompiled(config("auto"), GPU)[0]
    assert not describe_uncompiled(config("false"), GPU) and not describe_uncompiled(
        config("auto"), CPU
    )


def test_with_a_compiler(monkeypatch, tmp_path):
    (tmp_path / "my-cc").write_text("")
    (tmp_path / "my-cc").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "my-cc -m64")
    assert compiles(config("auto"), GPU) and not describe_uncompiled(config("auto"), GPU)
    assert not compiles(config("auto"), CPU)
    # Triton compiles a program that includes Python.h, a package of its own in most systems.
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert not compiles(config("auto"), GPU)
    assert "python3-dev" in describe_uncompiled(config("auto"), GPU)[0]

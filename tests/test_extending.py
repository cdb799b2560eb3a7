"""The files of docs/extending.md work as printed, with the commands printed beside them."""

import re
import runpy
import shlex
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import TINY, run_here, tiny_arguments

import hpm
from hpm.core.extras import need

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections():
    """Heading -> (files by name, commands), for the sections that print files."""
    found = {}
    for text in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        files = [code for language, code in BLOCK.findall(text) if language == "python"]
        named = {code.splitlines()[0].removeprefix("# "): code for code in files}
        commands = [code.strip() for language, code in BLOCK.findall(text) if not language]
        found[text.splitlines()[0]] = named, commands
    return found


SECTIONS = sections()


@pytest.fixture
def reader(tmp_path, monkeypatch, image_folder, finished_run):
    """The working directory of a reader, and the words to use for the page's examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for file in sorted(image_folder.rglob("*.png")):
            archive.write(file, file.relative_to(image_folder))
    before = set(sys.modules)
    yield {
        "photos/": str(image_folder),
        "flowers/": str(image_folder),
        "runs/first": str(finished_run.folder),
    }
    for module in set(sys.modules) - before:
        if module + ".py" in {name for files, _ in SECTIONS.values() for name in files}:
            del sys.modules[module]


def shortened(pretrain, words):
    """`hpm.pretrain` with a few steps of a tiny model, on the test's images."""
    return lambda data, **options: pretrain(words[data], **TINY | {"steps": 2} | options)


def test_every_part_is_there():
    assert list(SECTIONS) == [
        "A mask",
        "A target",
        "An encoder",
        "An evaluation",
        "A data source",
    ]
    assert all(len(files) == len(commands) == 1 for files, commands in SECTIONS.values())


@pytest.mark.parametrize("part", SECTIONS)
def test_a_part_works_as_printed(part, reader, monkeypatch):
    files, commands = SECTIONS[part]
    for name, code in files.items():
        Path(name).write_text(code, encoding="utf-8")
    for command in commands:
        program, *words = [reader.get(word, word) for word in shlex.split(command)]
        if program == "python":
            if not find_spec("timm"):
                pytest.skip("timm is not installed")
            need("timm", "timm", "the page's encoder")
            monkeypatch.setattr(hpm, "pretrain", shortened(hpm.pretrain, reader))
            runpy.run_path(words[0], run_name="__main__")
            made = Path("runs/narrow/backbone.safetensors")
        elif words[0] == "pretrain":
            result = run_here(*words, *tiny_arguments(steps=2))
            assert result.returncode == 0, result.stderr
            made = Path(words[words.index("--out") + 1]) / "backbone.safetensors"
        else:
            result = run_here(*words, "--device=cpu", "--workers=0")
            assert result.returncode == 0, result.stderr
            assert "trained, patch mean" in result.stdout
            (made,) = Path(reader["runs/first"], "evals").glob("nearest_mean_*.json")
        assert made.exists()

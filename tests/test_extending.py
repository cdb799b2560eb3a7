"""The files of docs/extending.md work as printed, with the commands printed beside them."""

import importlib
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import run_here, tiny_arguments

import hpm

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
# The smallest encoder that works.
MINIMAL = """class E(Encoder):
    def __init__(self, image_size, patch_size, channels, drop_path):
        super().__init__()
        self.embed_dim = 8
        self.blocks = nn.ModuleList()
    def forward(self, images, visible_ids=None):
        count = self.num_patches if visible_ids is None else visible_ids.shape[1]
        return torch.zeros(len(images), count, 8)
"""


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


def test_every_part_is_there():
    assert list(SECTIONS) == [
        "A mask",
        "A target",
        "An encoder",
        "Loading a run with parts of your own",
        "An evaluation",
        "A data source",
    ]
    numbers = [(len(files), len(commands)) for files, commands in SECTIONS.values()]
    assert numbers == [(1, 1), (1, 1), (1, 1), (0, 1), (1, 1), (1, 1)]


def follow(section, words):
    """Write the files of a section and run its command, on the test's images."""
    files, (command,) = SECTIONS[section]
    for name, code in files.items():
        Path(name).write_text(code, encoding="utf-8")
    typed = [words.get(word, word) for word in shlex.split(command)[1:]]
    few = tiny_arguments(steps=2) if typed[0] == "pretrain" else ["--device=cpu", "--workers=0"]
    if "--model" in typed:
        few = [option for option in few if not option.startswith("--model")]
    result = run_here(*typed, *few)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("part", ["A mask", "A target", "An encoder", "A data source"])
def test_a_part_of_pretraining(part, reader):
    follow(part, reader)
    (backbone,) = Path("runs").glob("*/backbone.safetensors")
    assert backbone.stat().st_size > 10_000


def test_an_evaluation(reader):
    assert "trained, patch mean" in follow("An evaluation", reader)
    assert list(Path(reader["runs/first"], "evals").glob("nearest_mean_*.json"))


def test_an_encoder_of_ones_own_is_imported_only_if_asked_for(reader, image_folder):
    follow("An encoder", reader)
    sys.modules.pop("pooling_encoder")
    evaluate = ["eval", "knn", "runs/pooling", str(image_folder), "--workers=0"]
    refused = run_here(*evaluate)
    assert refused.returncode == 2
    assert "pass `hpm --import pooling_encoder ...`" in refused.stderr
    assert "trained, patch mean" in follow("Loading a run with parts of your own", reader)
    encoder = hpm.load_encoder("runs/pooling")
    images = torch.zeros(2, 3, *encoder.encoder.image_size, dtype=torch.uint8)
    pooled, patches = encoder(images)
    assert pooled.shape == (2, 96) and patches.shape == (2, encoder.encoder.num_patches, 96)
    drawn = run_here("show", "runs/pooling", str(image_folder), "--out=figure.png")
    assert drawn.returncode == 0, drawn.stderr
    exported = run_here("export", "runs/pooling", "--to=timm", "--out=x.safetensors")
    assert exported.returncode == 2 and "timm does not have" in exported.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("class E: pass", "it is not a subclass of hpm.models.encoder.Encoder"),
        ("class E(Encoder):\n    def __init__(self, size): pass", "could not be built: TypeError"),
        (MINIMAL.replace("self.embed_dim = 8", "pass"), "lacks embed_dim"),
        (MINIMAL.replace("torch.zeros", "torch.zeroes"), "failed on a batch of two images"),
        (MINIMAL.replace("8)", "7)"), "must return its prefix tokens and the visible patches"),
    ],
)
def test_encoders_that_do_not_fit(code, message, reader, image_folder):
    header = "import torch\nfrom torch import nn\nfrom hpm.models.encoder import Encoder\n"
    Path("wrong_encoder.py").write_text(header + code)
    sys.modules.pop("wrong_encoder", None)
    importlib.invalidate_caches()
    result = run_here(
        "pretrain",
        str(image_folder),
        "--out=runs/wrong",
        "--model=wrong_encoder:E",
        "--image-size=32",
        "--patch-size=8",
    )
    sys.modules.pop("wrong_encoder", None)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not Path("runs/wrong").exists()


def test_import_of_a_module_that_does_not_exist():
    result = run_here("--import", "no_such_module", "eval", "knn", "run", "data")
    assert result.returncode == 2 and "no module named 'no_such_module'" in result.stderr
    assert run_here("--import").returncode == 2

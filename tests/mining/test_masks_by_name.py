"""Masks outside of the package, by module and function or by entry point."""

import sys

import pytest
import torch
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.core.plugins import installed_plugins
from hpm.mining.draw import Draw
from hpm.mining.masking import make_mask, to_mask
from hpm.mining.strategies import BUILT_IN, ENTRY_POINTS, find_mask

STRIPES = '''
import torch

def stripes(draw, grid, num_hidden):
    """Columns from the left."""
    columns = torch.arange(grid[1], device=draw.sample_ids.device).repeat(grid[0])
    return 0.5 * draw.noise(grid[0] * grid[1]) - columns

def too_few(draw, grid, num_hidden):
    return draw.noise(3)

def nothing(draw, grid, num_hidden):
    return None

def fails(draw, grid, num_hidden):
    raise KeyError("gone")

number = 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with masks, that is not on the path, as for the `hpm` command."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_masks.py").write_text(STRIPES)
    (tmp_path / "broken_masks.py").write_text("import torch\n\nstripes = undefined\n")
    caches = (find_mask.cache_clear, installed_plugins.cache_clear)
    for clear in caches:
        clear()
    yield tmp_path
    for clear in caches:
        clear()
    for module in ("own_masks", "broken_masks"):
        sys.modules.pop(module, None)


def test_a_mask_of_its_own_file_trains(folder, image_folder):
    result = run_here(
        "pretrain",
        image_folder,
        "--out",
        "run",
        "--mask",
        "own_masks:stripes",
        *tiny_arguments(steps=2),
    )
    assert result.returncode == 0, result.stderr
    assert (folder / "run" / "backbone.safetensors").exists()
    draw = Draw(0, 0, torch.arange(5))
    for unit in (1, 2):
        _, hidden = make_mask("own_masks:stripes", draw, (4, 4), 8, unit=unit)
        assert to_mask(hidden, 16).view(5, 4, 4)[:, :, :2].all()


def test_a_mask_of_an_installed_package_trains(folder, image_folder, monkeypatch):
    about = folder / "packages" / "stripes-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stripes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        f"[{ENTRY_POINTS}]\nstripes = own_masks:stripes\nrandom = own_masks:fails\n"
    )
    monkeypatch.syspath_prepend(str(folder / "packages"))
    run = hpm.pretrain(
        data=str(image_folder), out=str(folder / "run"), mask="stripes", **TINY | {"steps": 2}
    )
    assert run.backbone.exists()
    with pytest.raises(hpm.UserError, match="did you mean 'stripes'"):
        find_mask("stripe")
    # A built-in mask keeps its name.
    assert make_mask("random", Draw(0, 0, torch.arange(2)), (4, 4), 8)[1].shape == (2, 8)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("rondom", ["mask is 'rondom'; did you mean 'random'?", "MODULE:FUNCTION"]),
        ("easy-to-hard", ["did you mean 'easy_to_hard'?"]),
        ("no_such_file:stripes", ["no module named 'no_such_file'", "working directory"]),
        ("own_masks:stripe", ["own_masks has no 'stripe'; did you mean 'stripes'?"]),
        ("own_masks:", ["write it as MODULE:FUNCTION"]),
        ("own_masks:number", ["not a function"]),
        ("own_masks:too_few", ["[2, 16]", "[2, 3]"]),
        ("own_masks:nothing", ["[2, 16]", "NoneType"]),
        ("own_masks:fails", ["own_masks:fails failed", "KeyError: 'gone'"]),
        ("broken_masks:stripes", ["NameError: name 'undefined'", "(broken_masks.py:3)"]),
    ],
)
def test_masks_that_cannot_be_used_are_refused(mask, words, folder, image_folder):
    result = run_here("pretrain", image_folder, "--out", "run", "--mask", mask, *tiny_arguments())
    assert_refused(result, *words)
    assert not (folder / "run").exists()


def test_help_names_every_mask():
    text = run_here("pretrain", "--help").stdout
    assert [mask for mask in BUILT_IN if mask not in text] == []
    assert "MODULE:FUNCTION" in text

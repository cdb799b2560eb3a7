"""Targets by name: built-in, in a file of the user's own, or in an installed package."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.core import plugins
from hpm.core.config import PretrainConfig
from hpm.models.architecture import resolve_model
from hpm.targets import registry
from hpm.targets.base import Target
from hpm.targets.registry import BUILT_IN, check_target, find_target
from hpm.training.checks import check_pretrain

MEAN_COLOUR = '''
import torch

from hpm.models.patches import patchify
from hpm.targets.base import Target


class MeanColour(Target):
    """The mean of each patch, times `scale`."""

    dim = 1

    def __init__(self, inputs, scale: float = 1.0, squared: bool = False):
        self.patch_size, self.scale, self.squared = inputs.patch_size, scale, squared

    def __call__(self, images, features=None):
        return self.scale * patchify(images, self.patch_size).mean(-1, keepdim=True)

    def patch_loss(self, prediction, target):
        error = (prediction - target).abs().mean(-1)
        return error.square() if self.squared else error


no_target = torch.nn.Linear
'''
DOTTED = "mean_colour_target:MeanColour"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder with the file of a target, as the working folder."""
    (tmp_path / "mean_colour_target.py").write_text(MEAN_COLOUR)
    (tmp_path / "broken_target.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mean_colour_target", "broken_target"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_targets(name):
    assert issubclass(find_target(name), Target)


def test_a_target_in_a_file_trains_by_its_dotted_name(in_folder, image_folder):
    """Two steps from the command line."""
    out = in_folder / "run"
    result = run_here(
        "pretrain",
        image_folder,
        "--out",
        out,
        "--target",
        DOTTED,
        "--target-options",
        "scale=2,squared=true",
        *tiny_arguments(steps=2, log_every=1),
    )
    assert result.returncode == 0, result.stderr
    assert "target_options:\n- scale=2\n- squared=true" in (out / "config.yaml").read_text()
    lines = [line for line in hpm.Run(out).metrics() if "reconstruction_loss" in line]
    assert len(lines) == 2 and all(line["reconstruction_loss"] > 0 for line in lines)


def test_options_reach_the_target(in_folder):
    config = PretrainConfig(
        "x", "y", image_size=8, patch_size=4, target=DOTTED, target_options=("scale=2", "squared=1")
    )
    with pytest.raises(hpm.UserError, match="option squared cannot be '1': it must be true or fal"):
        check_target(config)
    config.target_options = ("scale=2", "squared=true")
    architecture = resolve_model(config)
    normalization = [0.0] * 3, [1.0] * 3
    cpu = torch.device("cpu")
    target = registry.make_target(config, architecture, *normalization, cpu)
    assert (target.scale, target.squared) == (2.0, True)
    assert torch.equal(target(torch.ones(1, 3, 8, 8)), torch.full((1, 4, 1), 2.0))
    # The module is imported now: a file of weights may name it.
    registry.make_target(config, architecture, *normalization, cpu, fetch=False)


def test_a_file_of_weights_imports_no_module(in_folder, image_folder):
    run = hpm.pretrain(data=str(image_folder), out=str(in_folder / "run"), target=DOTTED, **TINY)
    del sys.modules["mean_colour_target"]
    with pytest.raises(hpm.UserError, match="a module that a file names is not imported"):
        hpm.evaluate("hardness", str(run.folder), str(image_folder))
    assert "mean_colour_target" not in sys.modules


def test_a_target_of_an_installed_package(in_folder, monkeypatch):
    point = EntryPoint("mean_colour", DOTTED, registry.GROUP)
    monkeypatch.setattr(plugins, "installed_plugins", lambda group: {point.name: point})
    assert find_target("mean_colour").__name__ == "MeanColour"
    with pytest.raises(hpm.UserError, match="did you mean 'mean_colour'"):
        find_target("mean_color")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "pixel"}, "target is 'pixel'; did you mean 'pixels'.* .one of normalized_pix"),
        ({"target": "nowhere:Target"}, "target is 'nowhere:Target': no module named 'nowhere'"),
        ({"target": "broken_target:X"}, "importing it failed: .*nothing_of_this_name"),
        ({"target": "mean_colour_target:Other"}, "mean_colour_target has no 'Other'"),
        ({"target": "mean_colour_target:no_target"}, "is not a subclass of hpm.targets.base.Targ"),
        ({"target_options": ("a=1",)}, "target_options are for targets of your own, but target is"),
        ({"target": DOTTED, "target_options": ("scale",)}, "has 'scale': write name=value"),
        ({"target": DOTTED, "target_options": ("skale=1",)}, "no option 'skale'; did you mean 'sc"),
        ({"target": DOTTED, "target_options": ("scale=x",)}, "option scale cannot be 'x'.* number"),
        ({"target": DOTTED, "codebook": "x"}, "codebook is x, but target is mean_colour_target:M"),
    ],
)
def test_bad_targets(options, words, in_folder):
    with pytest.raises(hpm.UserError, match=words):
        check_pretrain(PretrainConfig("x", "y", image_size=32, patch_size=4, **options))


def test_bad_targets_leave_one_line(in_folder, image_folder):
    command = ["pretrain", image_folder, "--out", in_folder / "run"]
    result = run_here(*command, "--target=nowhere:Target")
    assert_refused(result, "target is 'nowhere:Target': no module named")
    assert not (in_folder / "run").exists()


def test_options_of_the_right_target_pass(tmp_path):
    check_target(PretrainConfig("x", "y", target="pixels", ranking_signal="normalized_pixels"))
    check_target(PretrainConfig("x", "y", target="frozen", target_model="timm/anything"))


def test_pixels_undo_the_normalisation():
    inputs = registry.TargetInputs(
        (2, 2),
        (2, 2),
        3,
        8,
        torch.tensor([0.1, 0.2, 0.3]),
        torch.tensor([0.5, 0.6, 0.7]),
        torch.device("cpu"),
    )
    pixels = torch.rand(2, 3, 4, 4)
    normalized = (pixels - inputs.mean.view(3, 1, 1)) / inputs.std.view(3, 1, 1)
    torch.testing.assert_close(inputs.to_pixels(normalized), pixels)

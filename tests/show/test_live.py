"""The live display of a training in a notebook, with a kernel that only records what it is told."""

import sys
import types

import pytest
from helpers import TINY

import hpm
from hpm.core.notebook import CellOutput, in_notebook
from hpm.core.progress import track
from hpm.show import live


@pytest.fixture
def cell(monkeypatch):
    """Outputs of the cell by id, in order; `updates` counts how often each was replaced."""
    outputs, updates = {}, {}

    def display(content, *, metadata, raw, display_id, update):
        assert raw and update == (display_id in outputs), "refreshed in place"
        updates[display_id] = updates.get(display_id, 0) + update
        outputs[display_id] = content

    shell = types.SimpleNamespace(kernel=object())
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: shell
    module.version_info = (9, 0)  # which matplotlib asks for
    module.display = types.ModuleType("IPython.display")
    module.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    return types.SimpleNamespace(outputs=outputs, updates=updates, shell=shell)


def test_a_training_shows_progress_curves_and_pictures(
    cell, image_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(live, "PROGRESS_EVERY", 0)
    monkeypatch.setattr(live, "CURVES_EVERY", 0)
    monkeypatch.setattr(live, "DRAWING_SHARE", 1e9)
    run = hpm.pretrain(image_folder, out=tmp_path / "run", **TINY | {"holdout": 8})
    progress, *others = cell.outputs.values()
    assert 'value="8" max="8"' in progress["text/html"]
    assert "step 8 of 8" in progress["text/plain"] and "loss" in progress["text/plain"]
    assert all(each["image/png"].startswith(b"\x89PNG") for each in others)
    assert {each["text/plain"] for each in others} == {"curves", "held-out images at step 8"}
    assert min(cell.updates.values()) >= 1
    out, err = capfd.readouterr()
    assert "into" in out and "held-out images: loss" in out, "text stays text"
    assert err == "" and "images/s" not in out
    assert "images/s" in (run.folder / "train.log").read_text()


def test_a_display_that_fails_never_stops_training(
    cell, image_folder, tmp_path, monkeypatch, capfd
):
    def fail(*arguments, **options):
        raise OSError("no display")

    monkeypatch.setattr(CellOutput, "show", fail)
    run = hpm.pretrain(image_folder, out=tmp_path / "run", **TINY)
    assert run.status.state == "finished"
    assert capfd.readouterr().out.count("the live display failed (no display)") == 1


def test_no_notebook_no_display(monkeypatch, cell):
    assert in_notebook()
    cell.shell.kernel = None  # IPython in a terminal
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", None)  # importing it would fail
    assert not in_notebook()
    assert list(track(range(3), "counting")) == [0, 1, 2] and not cell.outputs


def test_long_work_has_a_bar_that_goes(cell):
    assert list(track(iter("abc"), "counting", total=3)) == ["a", "b", "c"]
    assert list(cell.outputs.values()) == [{"text/plain": ""}]
    assert list(track(iter("abc"), "unknown length")) == ["a", "b", "c"]


def test_a_mistake_is_one_line_there_too():
    assert hpm.UserError("no such folder")._render_traceback_() == ["UserError: no such folder"]

"""docs/notebook.ipynb: its cells run, and it is stored with what they showed."""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

DOCS = Path(__file__).parents[1] / "docs"
# Of a smaller run of the same cells.
SMALL = {
    "STEPS = 250": "STEPS = 2",
    "range(800)": "range(60)",
    "batch_size=64": "batch_size=16",
    "epochs=20": "epochs=1",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("notebook_script", DOCS / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(notebook):
    """The kinds of output of each code cell."""
    return [
        sorted({kind for out in cell.outputs for kind in out.get("data", ())} - {"text/plain"})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def check(notebook):
    pictures, both = ["image/png"], ["image/png", "text/html"]
    table = ["text/html"]
    assert shown(notebook) == [[], both, table, pictures, pictures, pictures, table]
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert "\x1b" not in nbformat.writes(notebook)


def test_its_cells_run(script, tmp_path):
    notebook = script.make()
    for cell in notebook.cells:
        for old, new in SMALL.items():
            cell.source = cell.source.replace(old, new)
    assert "STEPS = 2\n" in notebook.cells[3].source
    script.execute(notebook, tmp_path)
    check(notebook)
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


@pytest.mark.slow
def test_a_folder_of_ones_own(script, tmp_path):
    """Photographs without classes, as a user would name them in the first cell."""
    (tmp_path / "my photos").mkdir()
    for number in range(60):
        colour = (4 * number, 200 - number, number)
        Image.new("RGB", (64, 50), colour).save(tmp_path / "my photos" / f"IMG {number}.JPG")
    notebook = script.make()
    *cells, _ = notebook.cells  # the evaluation needs labels, and comes last
    for cell in cells:
        for old, new in SMALL.items():
            cell.source = cell.source.replace(old, new)
    cells[1].source = 'photos = "my photos"'
    notebook.cells = cells
    script.execute(notebook, tmp_path)
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_it_is_stored_with_its_outputs(script):
    stored = nbformat.read(DOCS / "notebook.ipynb", 4)
    assert [c.source for c in stored.cells] == [c.source for c in script.make().cells]
    nbformat.validate(stored)
    check(stored)
    text = (DOCS / "notebook.ipynb").read_text()
    assert len(text) <= script.MOST_BYTES
    assert "step 250 of 250, finished" in text
    assert not re.search(r"(/tmp|/home|/root|/work)/", text)


@pytest.mark.slow
def test_all_of_it_runs(script, tmp_path):
    notebook = script.make()
    script.execute(notebook, tmp_path)
    check(notebook)

"""Write docs/notebook.ipynb: `python docs/notebook.py` runs its cells and stores what they show.

The text and the code of the notebook are below; edit them here. It needs the extras `clusters` and
`dev`.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FILE = Path(__file__).with_name("notebook.ipynb")
MOST_BYTES = 300_000  # of the file with its pictures


def text(content: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(content)


def code(content: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(content)


CELLS = [
    text(
        """\
# From a folder of images to clusters

`hpm` learns from images without labels. This notebook pre-trains a small model on a folder of
images, looks at what it has learned, and groups the images by it. It takes a minute or two on an
idle CPU. It needs `pip install '.[clusters]' jupyterlab`.

To use your own images, put `photos = "path/to/your/folder"` in place of this cell, which draws
800 images of shapes."""
    ),
    code(
        """\
from pathlib import Path

from PIL import Image

from hpm.data.demo import CLASSES, render

photos = Path("photos")
for number in range(800):
    drawn = render(number)
    folder = photos / CLASSES[drawn.label]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn.image).save(folder / f"{number}.png")"""
    ),
    text(
        """\
## Pre-train

Progress, curves and held-out images below are refreshed while the model trains. Interrupt the
kernel to save and stop; the same cell goes on from there."""
    ),
    code(
        """\
import hpm

STEPS = 250
run = hpm.pretrain(
    photos,
    out="runs/notebook",
    model="vit_nano",
    image_size=48,
    patch_size=8,
    target="pixels",
    mask_ratio=0.6,
    hard_share_end=0.25,
    steps=STEPS,
    batch_size=64,
    base_lr=1e-2,
)"""
    ),
    text("## What it has learned"),
    code("run"),
    text(
        """\
Bright patches are hard to reconstruct. The teacher predicts them from the whole image, and the
mask hides most of them."""
    ),
    code("run.show(photos, count=3)"),
    text(
        """\
`run.plot("learning_rate", "grad_norm")` draws any metric of the run, and `run.plot()` the curves
above.

## Clusters

`hpm.embed` computes a feature for each image, and `hpm.cluster` groups them. Each row shows the
images nearest to the centre of a cluster."""
    ),
    code(
        """\
features = hpm.embed(run, photos)
clusters = hpm.cluster(features, 5)
clusters"""
    ),
    code("clusters.map()"),
    text(
        """\
`clusters.numbers` holds the cluster of each image, and `clusters.members(0)` the paths of the
first one. `features.features` is an array of NumPy. [embedding.md](embedding.md) has more:
similar images, near-duplicates, and a page to browse.

## Evaluate

This needs a folder per class; other images have no labels to compare with. A linear probe tells
how much of the classes the features hold, beside random weights and raw pixels. After so short a
training, expect little."""
    ),
    code(
        """\
result = hpm.evaluate("linear", run, photos, epochs=20, lr=(0.1, 1.0), weight_decay=(0.0,))
result"""
    ),
]


def make() -> nbformat.NotebookNode:
    """The notebook, without outputs."""
    cells = copy.deepcopy(CELLS)
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: str | Path) -> None:
    """Run the cells in a folder. Raises CellExecutionError if one fails."""
    client = NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()


def tidy(notebook: nbformat.NotebookNode, folder: str | Path) -> None:
    """Name no folder of this machine, and join the pieces of text that a cell wrote."""
    real = re.escape(os.path.realpath(folder))
    for cell in notebook.cells:
        texts = [out for out in cell.get("outputs", []) if out.output_type == "stream"]
        for out in texts:
            out.text = re.sub(f"{real}/?", "", out.text)
        for out in texts[1:]:
            texts[0].text += out.text
            cell.outputs.remove(out)


def main() -> None:
    notebook = make()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
        tidy(notebook, folder)
    written = nbformat.writes(notebook)
    if len(written) > MOST_BYTES:
        raise SystemExit(f"the notebook has {len(written)} bytes, more than {MOST_BYTES}")
    FILE.write_text(written + "\n")
    print(f"{FILE}: {len(written)} bytes")


if __name__ == "__main__":
    main()

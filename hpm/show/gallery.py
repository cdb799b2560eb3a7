"""The page of `hpm show`: a strip of panels per image, each to be enlarged.

Without JavaScript it is a plain list of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np

from hpm.core.files import write_text
from hpm.show.figures import TITLES, Picture, head_pixels, pixels
from hpm.show.options import Panel
from hpm.show.page import image_uri, page

# Explanations for readers who have not read the documentation.
MEANING: dict[Panel, str] = {
    "image": "the input of the model.",
    "actual": "the reconstruction loss of each patch when it is hidden. Bright is high; each map "
    "is scaled to its own range; grey patches were never hidden.",
    "predicted": "the loss that the teacher predicts from the whole image.",
    "mask": "grey patches are hidden.",
    "reconstruction": "the hidden patches, predicted from the visible ones. Models of normalised "
    "pixels do not predict brightness and contrast; the true ones are shown.",
    "pca": "the first three principal components of the patch features as red, green and blue: "
    "patches of similar colour have similar features.",
    "attention": "which patches the class token attends to in the last block, mean over heads.",
}
SHARP = 128  # pixels below which an image is drawn without smoothing

STYLE = """
.strip { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(min(8rem, 45%), 1fr)); }
.strip img { width: 100%; height: auto; border-radius: 3px; }
.strip img[tabindex] { cursor: zoom-in; }
.strip figcaption { line-height: 1.3; margin-top: 0.25rem; }
""".strip()  # noqa: E501
GALLERY_STYLE = """
section { content-visibility: auto; contain-intrinsic-size: auto 14rem; margin: 0 0 0.75rem; }
details { margin: 0.75rem 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 60ch); gap: 0.15rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
dialog {
  border: 0; padding: 0.75rem; border-radius: 8px; background: var(--card); color: var(--ink);
  max-width: 96vw; max-height: 96vh;
}
dialog::backdrop { background: rgb(0 0 0 / 75%); }
dialog img {
  width: min(88vw, calc(74vh * var(--ratio))); max-width: none; height: auto;
  image-rendering: pixelated;
}
dialog p { max-width: none; margin: 0.5rem 0; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
"""

SCRIPT = """
const strips = [...document.querySelectorAll("section")].map(s => [...s.querySelectorAll("img")]);
const dialog = document.querySelector("dialog");
const [large, caption] = [dialog.querySelector("img"), dialog.querySelector("p")];
let row = 0, column = 0;
function enlarge(newRow, newColumn) {
  row = (newRow + strips.length) % strips.length;
  column = (newColumn + strips[row].length) % strips[row].length;
  const image = strips[row][column], ratio = image.naturalWidth / image.naturalHeight;
  large.src = image.src;
  large.alt = image.alt;
  large.style.setProperty("--ratio", ratio);
  caption.textContent = image.alt;
  if (!dialog.open) dialog.showModal();
}
const moves = {
  previous: () => enlarge(row, column - 1), next: () => enlarge(row, column + 1),
  above: () => enlarge(row - 1, column), below: () => enlarge(row + 1, column),
  close: () => dialog.close(),
};
const keys = {
  ArrowLeft: "previous", ArrowRight: "next", ArrowUp: "above", ArrowDown: "below",
};
strips.forEach((images, i) => images.forEach((image, j) => {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => enlarge(i, j));
  image.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(i, j); }
  });
}));
dialog.addEventListener("keydown", event => {
  if (event.key in keys) { event.preventDefault(); moves[keys[event.key]](); }
});
dialog.addEventListener("close", () => strips[row][column].focus());
for (const button of dialog.querySelectorAll("button"))
  button.addEventListener("click", moves[button.name]);
document.getElementById("hint").hidden = false;
"""

HINT = """
<p id="hint" class="faint" hidden>Click a picture, or Tab to it and press Enter, to enlarge it; then
← → go from panel to panel and ↑ ↓ from image to image.</p>
"""
ENLARGED = """
<dialog aria-label="enlarged"><img alt=""><p></p><div class="row">
<button name="previous">← panel</button><button name="next">panel →</button>
<button name="above">↑ image</button><button name="below">image ↓</button>
<button name="close">close</button></div></dialog>
"""


def write_gallery(
    shown: Picture, path: Path, title: str, names: Sequence[str], about: Sequence[str]
) -> None:
    """Write the page.

    Args:
        names: of the images. about: lines on how they were made.
    """
    panels = "".join(f"<dt>{TITLES[n]}</dt><dd>{MEANING[n]}</dd>" for n in shown.panels)
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    legend = f"<details><summary>What the panels show</summary><dl>{panels}</dl></details>"
    strips = "".join(_section(shown, row, name) for row, name in enumerate(names))
    body = f"<h1>{escape(title)}</h1>{lines}{legend}{HINT}{strips}{ENLARGED}"
    write_text(path, page(title, body, SCRIPT, STYLE + GALLERY_STYLE))


def _section(shown: Picture, row: int, name: str) -> str:
    """The strip of an image."""
    found = pixels(shown, row)
    figures = "".join(
        figure(panel, TITLES[kind], value_range(shown, row, kind), name)
        for kind, panel in found.items()
    )
    heads = "".join(
        figure(head, f"head {number}", "", name)
        for number, head in enumerate(head_pixels(shown, row), 1)
    )
    if heads:
        heads = f"<details><summary>attention, head by head</summary>{strip(heads, 7)}</details>"
    return f"<section><h3>{escape(name)}</h3>{strip(figures, len(found))}{heads}</section>"


def strip(figures: str, columns: int) -> str:
    return f'<div class="strip" style="max-width: {14 * columns}rem">{figures}</div>'


def figure(panel: np.ndarray, title: str, values: str, name: str) -> str:
    """A panel [H W 3] with its caption; `values` is what its colours stand for."""
    height, width = panel.shape[:2]
    kind: Literal["PNG", "JPEG"] = "PNG" if width < SHARP else "JPEG"
    sharp = ' class="map"' if width < SHARP else ""
    faint = f"<br>{escape(values)}" if values else ""
    return (
        f'<figure><img{sharp} src="{image_uri(panel, kind)}" alt="{escape(f"{title}, {name}")}" '
        f'width="{width}" height="{height}">'
        f"<figcaption>{escape(title)}{faint}</figcaption></figure>"
    )


def value_range(shown: Picture, row: int, panel: Panel) -> str:
    """The values of the darkest and of the brightest patch, of the actual loss alone: the predicted
    one has an order, but mostly no unit."""
    if panel != "actual" or shown.actual is None:
        return ""
    known = shown.actual[row][~shown.actual[row].isnan()]
    return f"{known.min():.3g} to {known.max():.3g}" if len(known) else "no patch was hidden"

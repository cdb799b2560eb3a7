"""The page of `hpm show`: a strip of panels per image, which a click enlarges.

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
from hpm.show.page import asset, image_uri, page
from hpm.show.strips import FRAMES, all_frames, as_strips, count_frames, cut

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
SHARP = 128  # images narrower than this (in pixels) are shown without smoothing


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

    names: of the images. about: lines that describe the settings.
    """
    panels = "".join(f"<dt>{TITLES[n]}</dt><dd>{MEANING[n]}</dd>" for n in shown.panels)
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    legend = f"<details><summary>What the panels show</summary><dl>{panels}</dl></details>"
    laid = all_frames(shown)
    short = as_strips(shown) if laid is not shown else None
    frames = count_frames(shown)
    strips = "".join(_section(laid, row, name, frames, short) for row, name in enumerate(names))
    body = f"<h1>{escape(title)}</h1>{lines}{legend}{HINT}{strips}{ENLARGED}"
    script = f"\n{asset('gallery.js')}\n"
    style = f"{asset('strip.css')}\n{asset('gallery.css')}\n"
    write_text(path, page(title, body, script, style))


def _section(shown: Picture, row: int, name: str, frames: int | None, short: Picture | None) -> str:
    """The strip of an image; of a clip, laid out by `all_frames`, animations, and some frames side
    by side (`short`)."""
    found = pixels(shown, row)
    figures = "".join(
        figure(cut(panel, frames), TITLES[kind], value_range(shown, row, kind), name)
        for kind, panel in found.items()
    )
    heads = "".join(
        figure(cut(head, frames), f"head {number}", "", name)
        for number, head in enumerate(head_pixels(shown, row), 1)
    )
    if heads:
        heads = f"<details><summary>attention, head by head</summary>{strip(heads, 7)}</details>"
    still = ""
    if short is not None:
        still = "".join(
            figure(panel, TITLES[kind], "", f"{name}, some frames", FRAMES)
            for kind, panel in pixels(short, row).items()
        )
        still = (
            f"<details><summary>some frames side by side</summary>"
            f'<div class="strip wide">{still}</div></details>'
        )
    strips = f"{strip(figures, len(found))}{still}{heads}"
    return f"<section><h3>{escape(name)}</h3>{strips}</section>"


def strip(figures: str, columns: int) -> str:
    return f'<div class="strip" style="max-width: {14 * columns}rem">{figures}</div>'


def figure(panel: np.ndarray, title: str, values: str, name: str, frames: int = 1) -> str:
    """A panel [H W 3], or an animation [T H W 3], with its caption. `values`: the range of its
    colours, as text. frames: pictures side by side in the panel."""
    height, width = panel.shape[-3:-1]
    kind: Literal["PNG", "JPEG"] = "PNG" if width < SHARP * frames else "JPEG"
    sharp = ' class="map"' if width < SHARP * frames else ""
    faint = f"<br>{escape(values)}" if values else ""
    return (
        f'<figure><img{sharp} src="{image_uri(panel, kind)}" alt="{escape(f"{title}, {name}")}" '
        f'width="{width}" height="{height}">'
        f"<figcaption>{escape(title)}{faint}</figcaption></figure>"
    )


def value_range(shown: Picture, row: int, panel: Panel) -> str:
    """The range of the actual loss, as text. Empty for other panels: the predicted loss usually has
    an order but no unit."""
    if panel != "actual" or shown.actual is None:
        return ""
    known = shown.actual[row][~shown.actual[row].isnan()]
    return f"{known.min():.3g} to {known.max():.3g}" if len(known) else "no patch was hidden"

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
from hpm.core.wording import worded
from hpm.show.drawing import LOSSES
from hpm.show.figures import TITLES, Picture, head_pixels, panel_title, pixels
from hpm.show.options import Panel
from hpm.show.page import asset, by_device, image_uri, page
from hpm.show.scale import bar, bar_style
from hpm.show.strips import FRAMES, all_frames, as_strips, count_frames, cut, frames_text

# Explanations for readers who have not read the documentation.
MEANING: dict[Panel, str] = {
    "image": "the input of the model.",
    "actual": "the reconstruction loss of each patch when it is hidden. Bright is high; grey "
    "patches were never hidden.",
    "predicted": "the loss that the teacher predicts from the whole image, on the scale of the "
    "actual loss. A predictor gives an order but no unit: each patch has the actual loss of the "
    "same rank in the image.",
    "mask": "grey patches are hidden.",
    "reconstruction": "the hidden patches, predicted from the visible ones. Models of normalised "
    "pixels do not predict brightness and contrast; the true ones are shown.",
    "pca": "the first three principal components of the patch features as red, green and blue: "
    "patches of similar colour have similar features.",
    "attention": "which patches the class token attends to in the last block, mean over heads. "
    "Bright is high, on a scale of its own in each image.",
}
# Maps that may lie over the image.
OVERLAID: tuple[Panel, ...] = ("actual", "predicted", "pca", "attention")
SHARP = 128  # images narrower than this (in pixels) are shown without smoothing


HINT = f"""
<p id="hint" class="faint" hidden>{
    by_device(
        "Click a picture, or Tab to it and press Enter, to enlarge it; then ← → go from panel to "
        "panel and ↑ ↓ from image to image.",
        "Touch a picture to enlarge it; then swipe from panel to panel and from image to image.",
    )
}</p>
"""
OVERLAY = """
<div class="row"><button type="button" id="overlay" aria-pressed="false" hidden>maps over the image
</button></div>
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
    clips = shown.of_clips
    hint, overlay, enlarged = (worded(text, clips) for text in (HINT, OVERLAY, ENLARGED))
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    meanings = legend(shown.panels, clips)
    explained = f"<details><summary>What the panels show</summary><dl>{meanings}</dl></details>"
    laid = all_frames(shown)
    short = as_strips(shown) if laid is not shown else None
    frames = count_frames(shown)
    which = frames_text(frames, shown.grid[0]) if frames else ""
    strips = "".join(
        _section(laid, row, name, frames, short, which) for row, name in enumerate(names)
    )
    overlay *= any(panel in OVERLAID for panel in shown.panels)
    body = f"<h1>{escape(title)}</h1>{lines}{explained}{hint}{overlay}{strips}{enlarged}"
    script = f"\n{asset('gallery.js')}\n"
    style = f"{asset('strip.css')}\n{asset('gallery.css')}\n{bar_style()}"
    write_text(path, page(title, body, script, style))


def legend(panels: Sequence[Panel], clips: bool) -> str:
    """What the panels of images, or of clips, mean."""
    found = "".join(f"<dt>{TITLES[n]}</dt><dd>{MEANING[n]}</dd>" for n in panels)
    return worded(found, clips)


def _section(
    shown: Picture, row: int, name: str, frames: int | None, short: Picture | None, which: str
) -> str:
    """The strip of an image; of a clip, laid out by `all_frames`, animations, and some frames side
    by side (`short`; `which` in words)."""
    found = pixels(shown, row)
    figures = "".join(
        figure(
            cut(panel, frames),
            panel_title(kind, shown.of_clips),
            name,
            _bar(shown, kind),
            kind in OVERLAID,
        )
        for kind, panel in found.items()
    )
    heads = "".join(
        figure(cut(head, frames), f"head {number}", name)
        for number, head in enumerate(head_pixels(shown, row), 1)
    )
    if heads:
        heads = f"<details><summary>attention, head by head</summary>{strip(heads, 7)}</details>"
    still = ""
    if short is not None:
        still = "".join(
            figure(panel, panel_title(kind, clips=True), f"{name}, some frames", frames=FRAMES)
            for kind, panel in pixels(short, row).items()
        )
        still = (
            f"<details><summary>{which} side by side</summary>"
            f'<div class="strip wide">{still}</div></details>'
        )
    strips = f"{strip(figures, len(found))}{still}{heads}"
    return f"<section><h3>{escape(name)}</h3>{strips}</section>"


def strip(figures: str, columns: int) -> str:
    return f'<div class="strip" style="max-width: {14 * columns}rem">{figures}</div>'


def figure(
    panel: np.ndarray,
    title: str,
    name: str,
    below: str = "",
    overlaid: bool = False,
    frames: int = 1,
) -> str:
    """A panel [H W 3], or an animation [T H W 3], with its caption.

    below: HTML of the caption's second line. overlaid: whether it may lie over the image. frames:
    pictures side by side in the panel.
    """
    height, width = panel.shape[-3:-1]
    kind: Literal["PNG", "JPEG"] = "PNG" if width < SHARP * frames else "JPEG"
    sharp = ' class="map"' if width < SHARP * frames else ""
    over = ' class="over"' if overlaid else ""
    return (
        f'<figure><span{over}><img{sharp} src="{image_uri(panel, kind)}" '
        f'alt="{escape(f"{title}, {name}")}" width="{width}" height="{height}">'
        f"</span><figcaption>{escape(title)}{below}</figcaption></figure>"
    )


def _bar(shown: Picture, panel: Panel) -> str:
    """The bar below maps of losses."""
    return bar(shown.scale) if panel in LOSSES and shown.scale is not None else ""

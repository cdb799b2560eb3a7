"""Figures of panels, drawn by matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from hpm.core.files import write_atomically
from hpm.show.figures import TITLES, Picture, panel_title, pixels
from hpm.show.options import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES: tuple[Panel, ...] = ("actual", "predicted")  # share a scale
BAR_HEIGHT = 0.5  # inches


class Drawing:
    """A figure that a notebook shows.

    figure: of matplotlib, to change before it is shown or saved.
    """

    def __init__(self, figure: Figure):
        self.figure = figure

    def save(self, path: str | Path) -> Path:
        """Write a file; the suffix determines the format (default PNG). Returns its path."""
        path = Path(path).expanduser()
        kind = path.suffix.lstrip(".") or "png"
        write_atomically(path, lambda temporary: self.figure.savefig(temporary, format=kind))
        return path

    def png(self, palette: bool = False) -> bytes:
        """The figure as PNG. palette: at most 256 colours, which takes about a third of the
        bytes."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        if not palette:
            return file.getvalue()
        from PIL import Image

        from hpm.data.pillow import open_by_pillow

        reduced = io.BytesIO()
        whole = open_by_pillow(file).convert("RGB")
        whole.quantize(256, dither=Image.Dither.NONE).save(reduced, "PNG", optimize=True)
        return reduced.getvalue()

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        return f"Drawing({width:.1f} x {height:.1f} inches)"

    def _repr_png_(self) -> bytes:
        return self.png(palette=True)


def new_figure(width: float, height: float, dpi: float = 120) -> Figure:
    """An empty figure of this size in inches, which no window and no other figure knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(shown: Picture, path: Path, title: str) -> None:
    """Write a figure with one row per image. The suffix determines the format (default PNG)."""
    drawing(shown, title).save(path)


def drawing(shown: Picture, title: str = "", across: float = 1.7) -> Drawing:
    """A figure with one row per image, and a bar for the colours of the losses. across: inches of
    an image."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rows, panels = len(shown.images), shown.panels
    height, width = shown.images.shape[-2:]
    across *= max(1, width / height / 2)  # film strips are wider
    row_height = across * min(height / width, 3)
    below = BAR_HEIGHT if shown.scale is not None else 0.0
    above = 0.6 if title else 0.25
    figure = new_figure(max(across * len(panels), 4), row_height * rows + above + below)
    if title:
        figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, len(panels), squeeze=False)
    for row in range(rows):
        for axis, (name, panel) in zip(axes[row], pixels(shown, row).items(), strict=True):
            axis.imshow(panel, extent=(0, width, height, 0), interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(panel_title(name, shown.of_clips), fontsize=10)
    if shown.scale is not None:
        losses = [panels.index(name) for name in LOSSES if name in panels]
        # Below the maps that it belongs to, and as wide.
        others = len(panels) - len(losses)
        colours = figure.colorbar(
            ScalarMappable(Normalize(*shown.scale), "magma"),
            ax=axes.ravel().tolist(),
            location="bottom",
            shrink=0.9 * len(losses) / len(panels),
            anchor=(losses[0] / others if others else 0.5, 1.0),
            aspect=18 * len(losses),
            pad=0.02,
        )
        colours.ax.tick_params(labelsize=8)
        colours.set_label(" and ".join(TITLES[panels[place]] for place in losses), fontsize=8)
    return Drawing(figure)

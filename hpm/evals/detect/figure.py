"""Images with their true objects beside the detected ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hpm.core.files import write_atomically
from hpm.data.joint import DetectionTesting
from hpm.data.rle import decode_masks
from hpm.data.sources import Source
from hpm.evals.detect.testing import Found
from hpm.evals.display import as_rgb
from hpm.weights.detection import DetectionModel

SHOWN_FROM = 0.5  # score
PANEL = 3.2  # width in inches
IMAGES_IN_A_ROW = 2
TALLEST = 1.5  # a panel, relative to its width
COVER = 0.4  # of masks over the image

Row = dict[str, Any]  # an object in COCO's JSON


def save_figure(
    path: Path, model: DetectionModel, source: Source, found: Found, count: int, title: str
) -> None:
    """Draw evenly spaced test images: the true objects on the left, detections with a score of at
    least 0.5 on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images = found.truth["images"]
    numbers = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    chosen = [images[number] for number in numbers]
    columns = min(IMAGES_IN_A_ROW, len(chosen))
    rows = [chosen[start : start + columns] for start in range(0, len(chosen), columns)]
    heights = [max(PANEL * min(_shape(each), TALLEST) for each in row) for row in rows]
    size = (2 * columns * PANEL, sum(heights) + 0.3 * len(rows) + 0.4)
    figure = Figure(size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(rows), 2 * columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    views = DetectionTesting(model.channels, source.is_deep(), size=None)
    for (left, right), each in zip(axes.reshape(-1, 2), chosen, strict=False):
        index = each["id"]
        pixels = as_rgb(views.image(source, index))
        true = [row for row in found.truth["annotations"] if row["image_id"] == index]
        scored = [row for row in found.results if row["image_id"] == index]
        sure = [row for row in scored if row["score"] >= SHOWN_FROM]
        draw_objects(left, pixels, true, model.classes)
        draw_objects(right, pixels, sure, model.classes)
        left.set_title(f"truth ({len(true)})", fontsize=9)
        less_sure = f", {len(scored) - len(sure)} below" if len(scored) > len(sure) else ""
        right.set_title(f"score {SHOWN_FROM} or more ({len(sure)}){less_sure}", fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _shape(image: Row) -> float:
    return image["height"] / image["width"]


def draw_objects(
    axis: Any, pixels: Float[np.ndarray, "height width 3"], rows: Sequence[Row], classes: list[str]
) -> None:
    """Draw an image with boxes, masks (if there are any), class names and scores."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    palette = colormaps["tab10"](range(10))[:, :3]
    # One colour for each class; of a single class, one for each object.
    keys = [row["category_id"] if len(classes) > 1 else n for n, row in enumerate(rows)]
    colours = palette[np.array(keys, dtype=int) % len(palette)]
    codes = [row["segmentation"] for row in rows if row.get("segmentation")]
    if len(codes) == len(rows):
        pixels = pixels.copy()
        for mask, colour in zip(decode_masks(codes, height, width), colours, strict=True):
            pixels[mask] = (1 - COVER) * pixels[mask] + COVER * colour
    axis.imshow(pixels, interpolation="nearest")
    for row, colour in zip(rows, colours, strict=True):
        x, y, w, h = row["bbox"]
        # Pixel n lies from n - 0.5 to n + 0.5 here.
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour, lw=1.4))
        text = classes[row["category_id"]] + (f" {row['score']:.2f}" if "score" in row else "")
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        axis.text(
            max(x, 0),
            max(y, 0),
            text,
            fontsize=7,
            color="white",
            va="bottom",
            bbox=box,
            clip_on=True,
        )

"""A figure of test images: image, truth, prediction, error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hpm.core.files import write_atomically
from hpm.data.arrays import UnreadableImage
from hpm.data.joint import SegmentationTesting
from hpm.data.mask_files import IGNORED
from hpm.data.sources import Source
from hpm.evals.display import as_rgb
from hpm.evals.segmentation_metrics import confusion_matrices, count_pixels, mean_iou
from hpm.models.upernet import resize
from hpm.weights.segmentation import SegmentationModel

COLUMNS = ("image", "truth", "prediction", "error")
IGNORED_COLOUR = 235
MAX_NAMED = 24  # classes in the legend
WIDTH = 2.6  # inches of a column

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, truth, prediction


def draw_predictions(
    model: SegmentationModel, source: Source, views: SegmentationTesting, ids: Sequence[int]
) -> Callable[[Path], Any]:
    """Return a function that writes the figure as PNG. The predictions are made now; unreadable
    images are left out."""
    rows: list[Row] = []
    for index in ids:
        try:
            image, labels = views(source, (0, index))
        except (UnreadableImage, OSError):
            continue
        size = (labels.shape[0], labels.shape[1])
        predicted = model.labels(image, size).cpu().numpy()
        rows.append((_picture(image, size), labels.numpy(), predicted))
    return lambda path: write_atomically(path, lambda file: _write(file, rows, model.classes))


def _picture(image: Tensor, size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """A loaded image as RGB at the size of the labels."""
    shown = torch.from_numpy(as_rgb(image)).permute(2, 0, 1)
    pixels = 255 * resize(shown[None], size)[0]
    return pixels.permute(1, 2, 0).round().to(torch.uint8).numpy()


def _colours(count: int) -> UInt8[np.ndarray, "{count} 3"]:
    """matplotlib's tab20 colours, saturated ones first, without the reds, which mark errors."""
    from matplotlib import colormaps

    order = [number for number in (*range(0, 20, 2), *range(1, 20, 2)) if number not in (6, 7)]
    table = np.array([colormaps["tab20"](number)[:3] for number in order])
    return (255 * table).round().astype(np.uint8)[np.arange(count) % len(table)]


def _coloured(
    labels: UInt8[np.ndarray, "height width"],
) -> UInt8[np.ndarray, "height width 3"]:
    table = np.full((256, 3), IGNORED_COLOUR, np.uint8)
    table[:IGNORED] = _colours(IGNORED)
    return table[labels]


def _error(row: Row) -> UInt8[np.ndarray, "height width 3"]:
    """The image in pale grey, with wrong pixels in red and ignored ones in white."""
    image, truth, predicted = row
    grey = 0.5 * image.mean(2, keepdims=True) + 110
    shown = np.repeat(grey, 3, 2)
    shown[(truth != predicted)] = (214, 39, 40)
    shown[truth == IGNORED] = 255
    return shown.astype(np.uint8)


def _write(file: Path, rows: list[Row], classes: list[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ratio = max((image.shape[0] / image.shape[1] for image, _, _ in rows), default=1)
    legend_lines = -(-min(len(classes) + 2, MAX_NAMED + 2) // 6)
    height = len(rows) * (WIDTH * ratio + 0.12) + 0.3 + 0.24 * legend_lines
    figure = Figure(figsize=(len(COLUMNS) * WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(rows)), len(COLUMNS), squeeze=False)
    for number, row in enumerate(rows):
        image, truth, predicted = row
        panels = (image, _coloured(truth), _coloured(predicted), _error(row))
        for axis, title, panel in zip(axes[number], COLUMNS, panels, strict=True):
            axis.imshow(panel, interpolation="nearest")
            if number == 0:
                axis.set_title(title, fontsize=10)
        iou = _iou(truth, predicted, len(classes))
        axes[number][2].set_xlabel(f"mean IoU {iou:.0f} %", fontsize=8)
        wrong = (truth != predicted) & (truth != IGNORED)
        share = 100 * wrong.sum() / max(1, (truth != IGNORED).sum())
        axes[number][3].set_xlabel(f"{share:.0f} % of pixels wrong", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        Patch(color=tuple(colour / 255), label=classes[number])
        for number, colour in _legend(rows, classes)
    ]
    handles += [
        Patch(facecolor=str(IGNORED_COLOUR / 255), edgecolor="0.6", label="(ignored)"),
        Patch(color=(214 / 255, 39 / 255, 40 / 255), label="(error)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(file, format="png", dpi=110)


def _legend(rows: list[Row], classes: list[str]) -> list[tuple[int, Float[np.ndarray, 3]]]:
    """Numbers and colours of the classes in the figure; of many, the most common ones."""
    seen = np.zeros(256, np.int64)
    for _, truth, predicted in rows:
        for labels in (truth, predicted):
            seen += np.bincount(labels.ravel(), minlength=256)
    common = [int(n) for n in np.argsort(-seen[: len(classes)], kind="stable") if seen[n]]
    colours = _colours(len(classes))
    return [(number, colours[number]) for number in sorted(common[:MAX_NAMED])]


def _iou(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Mean IoU of one image, in percent."""
    pair = (torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
    return float(mean_iou(count_pixels(confusion_matrices(*pair, classes)))[0])

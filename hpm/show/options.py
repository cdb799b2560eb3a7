"""Options of show, view and report."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

Panel = Literal["image", "actual", "predicted", "mask", "reconstruction", "pca", "attention"]

PANELS: tuple[Panel, ...] = typing.get_args(Panel)


@dataclass
class ReportConfig:
    """Write the report of a run again, from what is in its folder."""

    run: str
    """Run folder."""
    out: str | None = None
    """File to write (default: report.html in the run folder)."""


@dataclass
class ShowConfig:
    """Draw what a model makes of images: losses, mask, reconstruction, features, attention."""

    run: str
    """Run folder, checkpoint, backbone file, what --init takes, or timm/NAME."""
    data: str
    """Images (see pretrain), or one image file."""
    out: str = "show.png"
    """File to write: a figure (.png, .pdf, .svg, .jpg), or a page to browse (.html)."""
    panels: tuple[Panel, ...] | None = None
    """What to show, e.g. image,pca,attention: the image, its actual loss, the predicted loss, the
    mask, the reconstruction, the principal components (PCA) of the features, the attention of the
    class token (default: all that the file can show)."""
    images: int = 8
    """How many images: at most 100 in a figure, 2000 in a page."""
    hard_share: float | None = None
    """Share of the hidden patches that are the hardest (default: as at the end of training)."""
    mask_ratio: float | None = None
    """Share of the patches that is hidden (default: as in training)."""
    num_masks: int = 10
    """Random masks over which the actual loss is averaged."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Of the masks and of the choice of images."""


@dataclass
class ViewConfig:
    """Open a page on this machine to try a model on images, with other masks."""

    run: str
    """Run folder, checkpoint, backbone file, what --init takes, or timm/NAME."""
    data: str | None = None
    """Images to offer as examples (default: the run's, or else the built-in ones)."""
    port: int | None = None
    """Of the page (default: 7860, or the next free one)."""
    open: bool = False
    """Open the page in a browser."""
    num_masks: int = 10
    """Random masks over which the actual loss is averaged."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

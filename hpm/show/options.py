"""Options of show, view and report."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from hpm.core.options import option

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
    out: str = option("show.png", main=True)
    """File to write: a figure (.png, .pdf, .svg, .jpg), or a page to browse (.html)."""
    panels: tuple[Panel, ...] | None = option(None, main=True)
    """What to show, e.g. image,pca,attention: the image, its actual loss, the predicted loss, the
    mask, the reconstruction, the principal components (PCA) of the features, the attention of the
    class token (default: all that the file can show)."""
    images: int = option(8, at_least=1, main=True)
    """How many images: at most 100 in a figure, 2000 in a page."""
    hard_share: float | None = option(None, at_least=0, at_most=1)
    """Share of the hidden patches that are the hardest (default: as at the end of training)."""
    mask_ratio: float | None = option(None, above=0, below=1)
    """Share of the patches that is hidden (default: as in training)."""
    num_masks: int = option(10, at_least=1)
    """Random masks over which the actual loss is averaged."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = option(0, at_least=0)
    """Of the masks and of the choice of images."""


@dataclass
class ViewConfig:
    """Open a page on this machine to try a model on images, with other masks."""

    run: str
    """Run folder, checkpoint, backbone file, what --init takes, or timm/NAME."""
    data: str | None = None
    """Images to offer as examples (default: the run's, or else the built-in ones)."""
    port: int | None = option(None, at_least=0, at_most=65535)
    """Of the page (default: 7860, or the next free one)."""
    open: bool = False
    """Open the page in a browser."""
    num_masks: int = option(10, at_least=1)
    """Random masks over which the actual loss is averaged."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

"""Options of show, view and report."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from hpm.core.choices import DeviceName
from hpm.core.options import LARGEST_SEED, option

Panel = Literal["image", "actual", "predicted", "mask", "reconstruction", "pca", "attention"]

PANELS: tuple[Panel, ...] = typing.get_args(Panel)


@dataclass
class ReportConfig:
    """Rewrite the report of a run or of an evaluation from the files in its folder."""

    run: str
    """Run folder, or the JSON file of an evaluation."""
    out: str | None = option(None, path=True)
    """File to write (default: report.html in the folder of the run or of the evaluation's
    training; FILE.html for the FILE.json of an evaluation that trains nothing)."""


@dataclass
class CompareConfig:
    """Draw runs beside each other on one page: curves, options that differ, evaluations, images."""

    runs: tuple[str, ...]
    """Run folders, or folders of run folders, such as that of hpm ablate."""
    out: str = option("compare.html", path=True, main=True)
    """Page to write (.html)."""
    data: str | None = option(None, main=True)
    """Images to draw (default: the data of the first run). Those of the test split if there is
    one."""
    images: int = option(8, at_least=0, at_most=32, main=True)
    """Number of images to draw by every run, at random; 0 draws none, and reads no weights."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    """Random seed of the masks and of the choice of images."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""


@dataclass
class ShowConfig:
    """Draw a model's losses, mask, reconstruction, features and attention on images; or clusters of
    the features that hpm embed wrote."""

    run: str
    """Run folder, checkpoint or weights file (anything that --init takes), or timm/NAME; or
    features of hpm embed."""
    data: str | None = option(None, main=True)
    """Images (see pretrain), or one image file. For features, only needed if the images have
    moved."""
    out: str = option("show.png", path=True, main=True)
    """File to write: a figure (.png, .pdf, .svg, .jpg) or a page to browse (.html)."""
    panels: tuple[Panel, ...] | None = option(None, main=True)
    """Comma-separated panels: image, actual (loss), predicted (loss), mask, reconstruction, pca (of
    the features), attention (of the class token) (default: all that the weights allow)."""
    images: int = option(8, at_least=1, main=True)
    """Number of images: at most 100 in a figure, 2000 in a page. For features: images shown per
    cluster."""
    clusters: int | None = option(None, at_least=1)
    """For features: number of clusters (default: depends on the number of images, at most 20)."""
    hard_share: float | None = option(None, at_least=0, at_most=1)
    """Fraction of the hidden patches that are mined (default: as at the end of training)."""
    mask_ratio: float | None = option(None, above=0, below=1)
    """Fraction of the patches to hide (default: as in training)."""
    num_masks: int = option(10, at_least=1)
    """Number of random masks to average the actual loss over."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    """Random seed of the masks and of the choice of images."""


@dataclass
class ViewConfig:
    """Open a local web page to try a model on images, with adjustable masks."""

    run: str
    """Run folder, checkpoint or weights file (anything that --init takes), or timm/NAME."""
    data: str | None = None
    """Images to offer as examples (default: those of the run, or the built-in images)."""
    port: int | None = option(None, at_least=0, at_most=65535)
    """Port of the page (default: 7860, or the next free one)."""
    open: bool = False
    """Open the page in a browser."""
    num_masks: int = option(10, at_least=1)
    """Number of random masks to average the actual loss over."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""

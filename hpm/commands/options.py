"""Options of the other verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.core.config import PretrainConfig
from hpm.core.options import option


@dataclass
class ExportConfig:
    """Hand the backbone over to other software, checked to give the same outputs there."""

    run: str
    """Run folder, checkpoint, backbone file, what --init takes, or timm/NAME; or a segmenter that
    hpm eval segment trained (to onnx)."""
    to: Literal["timm", "hf", "torchvision", "onnx", "safetensors"]
    """Library or format; hf is transformers of Hugging Face, safetensors our own backbone file."""
    out: str
    """File to write (of hf a folder); nothing is overwritten."""
    teacher: bool = False
    """The teacher's weights (run or checkpoint only)."""
    pool: Literal["mean", "cls"] = "mean"
    """Of timm and onnx, what they pool: the mean of the patches, or the class token."""
    with_decoder: bool = False
    """Of hf: a ViTMAEForPreTraining, with the reconstructor (run or checkpoint only)."""
    push: str | None = None
    """USER/NAME on the Hugging Face hub to upload to, with a model card (private if new)."""
    public: bool = False
    """With push: make a new repository public."""
    with_figure: bool = False
    """Put the run's latest figure, which shows some of its images, beside the model card."""
    crop_share: float = option(1.0, above=0, at_most=1)
    """Of hf, for its preprocessing: as in the evaluations."""
    licence: str | None = None
    """Of the weights, for the model card: apache-2.0, cc-by-nc-4.0, ..."""


@dataclass
class AblateConfig(PretrainConfig):
    """Pre-train with some options changed, over seeds, and compare (all options of pretrain)."""

    arm: tuple[str, ...] = option((), main=True)
    """A set of options to compare: mae, predictor, hpm, hpm_memory, or your own, `NAME: mask=random
    predictor_loss=none`; may be given several times. The others are compared with the first."""
    vary: tuple[str, ...] = option((), main=True)
    """An option and its values, `mask=random,easy_to_hard`; may be given several times: every
    combination is run, with every arm."""
    seeds: int = option(3, at_least=1, main=True)
    """How many seeds, from --seed on."""
    labels: str | None = option(None, main=True)
    """Labelled images for kNN and linear probe (default: the data, where it has labels)."""


@dataclass
class BenchConfig(PretrainConfig):
    """What a training step costs: MAE and HPM in turns, on noise, phase by phase (all options of
    pretrain; those that say how patches are mined and losses predicted are HPM's alone)."""

    data: str = "demo"
    """Not looked at."""
    out: str = ""
    """Not written to."""
    batch_size: int | None = option(64, at_least=1, main=True)
    """Images per optimiser step."""
    repeats: int = option(5, at_least=1, main=True)
    """Rounds, each of MAE, HPM and a matrix product."""
    steps_each: int = option(3, at_least=1, main=True)
    """Steps of each method in a round."""
    json: str | None = option(None, main=True)
    """File for the numbers."""


@dataclass
class BenchDataConfig:
    """How fast images are loaded, for 1, 2, ... workers, against the bare libraries; what limits
    it."""

    data: str
    """Images (see pretrain); of the training split."""
    image_size: int | tuple[int, int] = 224
    """As in pretrain."""
    channels: int = option(3, at_least=1, at_most=32)
    """As in pretrain."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """As in pretrain."""
    batch_size: int = option(64, at_least=1)
    """Images that a worker hands over at a time."""
    workers: int | None = option(None, at_least=1)
    """Most workers to try (default: as many as cores)."""
    images_per_second: float | None = None
    """Speed of a training: how many workers does it need?"""
    images: int = option(1024, at_least=1)
    """Images in each reading."""
    repeats: int = option(3, at_least=1)
    """Rounds, each of the bare libraries and of every number of workers."""
    json: str | None = None
    """File for the numbers."""


@dataclass
class TokenizeConfig:
    """Learn a codebook of discrete tokens for `--target tokens`."""

    data: str
    """Images (see pretrain); the training split alone is used."""
    out: str = "codebook.safetensors"
    """File to write."""
    of: str = "pixels"
    """What is tokenised: pixels of patches, or the features of a frozen model (timm/NAME, hf/NAME
    or a folder)."""
    codes: int = option(512, at_least=2)
    """Number of tokens."""
    image_size: int | tuple[int, int] = 224
    """Pixels, as in pre-training."""
    patch_size: int | tuple[int, int] = 16
    """Pixels, as in pre-training."""
    channels: int = option(3, at_least=1, at_most=32)
    """As in pre-training."""
    images: int = option(10_000, at_least=1)
    """Images to learn from, drawn at random; all if there are fewer."""
    patches: int = option(200_000, at_least=1)
    """Patches to learn from, drawn at random."""
    rounds: int = option(100, at_least=1)
    """Most rounds of k-means."""
    workers: int = option(0, at_least=0)
    """Processes that load images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = option(0, at_least=0)
    """Of what is drawn, and of the first codes."""


@dataclass
class PrepareConfig:
    """Shrink images once into large files that are fast to read, for pretrain and eval."""

    data: str
    """Images (see pretrain), with their splits and labels."""
    out: str
    """Folder to write, to be named as --data; the same command again goes on where it stopped."""
    size: int = option(512, at_least=1, main=True)
    """Pixels of the shorter side that larger images are reduced to. 512 leaves even a crop of a
    fifth of the area 224 pixels; 256 is smaller and faster."""
    quality: int = option(90, at_least=1, at_most=100, main=True)
    """Of the JPEG that reduced images are written as; others are kept as they are."""
    channels: int = option(3, at_least=1, at_most=32)
    """Of .npy and TIFF, as in pretrain."""
    workers: int | None = option(None, at_least=0)
    """Processes (default: one per spare core, at most 16)."""


@dataclass
class DemoConfig:
    """The whole tour on built-in images: pre-train, measure, draw. Minutes on a CPU."""

    out: str = "runs/demo"
    """Run folder."""
    steps: int | None = option(None, at_least=1)
    """Optimiser steps, instead of the preset's."""


@dataclass
class PredictConfig:
    """Write what a fine-tuned model predicts for a folder of images: masks as PNG."""

    model: str
    """Fine-tuned model: its file, or a folder that holds one, such as evals/segment_.../trained."""
    images: str
    """Folder of images (searched through all its folders), or one image."""
    out: str
    """Folder to write into: PNG masks named as the images, with a palette, and classes.txt."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1)
    """Stop if more than this fraction of the images cannot be read."""
    workers: int | None = option(None, at_least=0)
    """Number of processes that load images (default: one per spare core, at most 16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto uses the GPU if there is one."""

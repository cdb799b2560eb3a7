"""Every option on one page: one typed dataclass per verb, read by the command line and by Python.

A duration is written as text with its unit, `40 epochs`, `500 steps` or `5%` (of the training), and
is converted to steps once, by `schedule.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from hpm.errors import UserError, nearest
from hpm.mining.masking import HARD_SHARES, Mask, Schedule

TargetName = Literal["normalized_pixels", "pixels", "hog", "teacher", "frozen", "tokens"]
RankingSignal = Literal["target", "pixels", "normalized_pixels"]
PredictorLoss = Literal["relative", "absolute", "none"]
TrackerName = Literal["none", "wandb", "mlflow"]
TIMM = "timm/"
Panel = Literal["image", "actual", "predicted", "mask", "reconstruction", "pca", "attention"]
PANELS: tuple[Panel, ...] = typing.get_args(Panel)
Flip = Literal["none", "horizontal", "vertical", "both"]
PRESETS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelSize:
    """Encoder: width, blocks, heads; the same of both decoders; usual patch size in pixels."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    patch_size: int = 16


SIZES: dict[str, ModelSize] = {
    "vit_nano": ModelSize(96, 4, 3, 64, 2, 2),
    "vit_tiny": ModelSize(192, 12, 3, 128, 4, 4),
    "vit_small": ModelSize(384, 12, 6, 256, 4, 8),
    "vit_base": ModelSize(768, 12, 12),
    "vit_large": ModelSize(1024, 24, 16),
    "vit_huge": ModelSize(1280, 32, 16, patch_size=14),
}


@dataclass
class PretrainConfig:
    """Pre-train a Vision Transformer on unlabelled images."""

    data: str
    """Images: a folder (searched recursively), a list file (`path label` per line), a parquet file
    or folder, or `demo`, the built-in images. Where it has a train and a val (or test) split,
    training uses train alone."""
    out: str
    """Run folder. The same command again continues an interrupted run."""

    model: str = "vit_small"
    """Encoder: vit_nano, vit_tiny, vit_small, vit_base, vit_large or vit_huge; or timm/NAME, a
    plain Vision Transformer or a Hiera of timm. Its decoders are sized to match (for timm's: those
    of our size with the nearest width)."""
    pretrained: bool = False
    """Start from timm's weights of a timm/NAME; images are then normalised as they were for these
    (see normalize)."""
    image_size: int | tuple[int, int] = 224
    """Pixels, one number or [height, width]."""
    patch_size: int | tuple[int, int] | None = None
    """Pixels, one number or [height, width]; usually 16 (14 for vit_huge; timm's as they are)."""
    channels: int = 3
    """1: grey, 3: RGB, 4: RGBA; up to 32 in TIFF and .npy."""
    decoder_dim: int | None = None
    """Width of the reconstructor and of the predictor (default: by model)."""
    decoder_depth: int | None = None
    """Blocks of each decoder (default: by model)."""
    decoder_heads: int | None = None
    """Attention heads of each decoder (default: by model)."""

    mask: Mask = "easy_to_hard"
    """Which patches to hide. By the teacher's predicted losses: the hardest more and more
    (easy_to_hard) or less and less (hard_to_easy), a fixed share of them (moderate), always the
    hardest or the easiest. By the teacher's attention of the class token: attention. By chance:
    random, block (one square), multi_block, uniform (one visible in each 2x2 patches), or noise of
    a colour, from large to small blobs: red_noise, green_noise, purple_noise, blue_noise."""
    mask_ratio: float = 0.75
    """Share of the patches that is hidden, between 0 and 1."""
    secondary_mask_ratio: float | None = None
    """Share of the visible patches whose content is replaced by a learned one (default: 0.25 for
    mask uniform, else none)."""
    hard_share_start: float | None = None
    """Share of the hidden patches that are mined when training starts (alpha_0; default: by mask,
    0 for easy_to_hard)."""
    hard_share_end: float | None = None
    """The same when training ends (alpha_T; default: by mask, 0.5 for easy_to_hard)."""
    hard_share_schedule: Schedule = "linear"
    """How the share goes from the one to the other; constant: as at the end, throughout."""
    hard_share_by: Literal["step", "epoch"] = "step"
    """When the share changes: at every step, or once an epoch (the paper)."""
    teacher_view: Literal["full", "masked"] = "full"
    """What the teacher sees when it predicts losses: the whole image (the paper), or images masked
    as the student's, as few as hide every patch once: what the predictor was trained on."""
    teacher_scale: float = 1.0
    """Size of the images that the teacher predicts losses of, as a share of image_size: 0.5 costs
    about a quarter."""
    mine_every: int = 1
    """Steps from one prediction of the teacher to the next. In between the patches are mined by
    what it last predicted of the same images; those it was never asked about are hidden at
    random."""
    mine_by: Literal["teacher", "memory"] = "teacher"
    """Where it is known from how hard a patch is: the teacher's prediction, or a memory of the
    losses that the student really had at that place of that image in earlier epochs, which costs
    next to nothing and needs no predictor."""
    target: TargetName = "normalized_pixels"
    """What is reconstructed: pixels standardised within their patch, raw pixels, histograms of
    oriented gradients, the EMA teacher's features, a frozen model's features, or the tokens of a
    codebook."""
    target_model: str | None = None
    """Of target frozen: timm/NAME, hf/NAME (hf/facebook/dino-vits16), or a folder."""
    codebook: str | None = None
    """Of target tokens: the file that `hpm tokenize` wrote."""
    ranking_signal: RankingSignal = "target"
    """Of pixel targets: the loss that the predictor ranks by, in raw or in normalised pixels."""
    predictor_loss: PredictorLoss = "relative"
    """How the predictor learns: from pairwise order, by regression, or not at all (plain MAE
    together with --mask random)."""
    predictor_weight: float = 1.0
    """Weight of the predictor's loss beside the reconstruction's."""
    predictor_detach: bool = False
    """Keep the predictor's loss from training the encoder."""
    predictor_dim: int | None = None
    """Width of the predictor (default: decoder_dim)."""
    predictor_depth: int | None = None
    """Blocks of the predictor (default: decoder_depth)."""
    predictor_heads: int | None = None
    """Attention heads of the predictor (default: decoder_heads)."""
    predictor_head: Literal["patch", "scalar"] = "patch"
    """Output of the predictor: the mean of as many values as the patch has pixels (the paper), or
    one number."""

    epochs: int = 100
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int | None = None
    """Images per optimiser step, over all processes (default: 256, or as many as there are)."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another, to save memory."""
    base_lr: float | None = None
    """Peak learning rate per 256 images of a batch (default: by the number of steps; 1.5e-4, the
    paper's, from 100,000 on)."""
    warmup: str = "10%"
    """Linear warm-up of the learning rate."""
    weight_decay: float = 0.05
    """Of AdamW, on all but 1-D parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    clip_grad: float = 5.0
    """Largest norm of the gradient."""
    ema_horizon_start: str = "0.8%"
    """How far back the teacher's average reaches at first: decay = 1 - 1 / horizon in steps. The
    defaults are what the paper's 0.999 and 0.9999 are on ImageNet."""
    ema_horizon_end: str = "8%"
    """The same after the ramp."""
    ema_ramp: str = "50%"
    """How long the decay rises for."""
    init: str | None = None
    """Start from the weights of another run or weights file (not for resuming), also of published
    HPM, MAE, timm's or Hugging Face's ViT; another image or patch size is resampled to."""
    init_partial: bool = False
    """Accept an --init file that has only some of the tensors."""
    init_teacher: bool = False
    """Start from the teacher's (EMA) weights of the --init file."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random crop, as a share of the image."""
    flip: bool | Flip = True
    """Mirror half of the images: horizontally (or true), vertically (which suits images without an
    up and down, from the air or a microscope), both, or none (or false)."""
    repeat_augment: int = 1
    """Views of each image in a batch, decoded once, each with a crop, a flip and a mask of its own
    (repeated augmentation). They count as images: a batch holds that many times fewer different
    ones, an epoch is as many steps as without, and to go through all images takes that many
    epochs."""
    normalize: Literal["auto", "measured", "imagenet", "timm"] = "auto"
    """Mean and deviation of the channels: measured from the data, ImageNet's, or those that timm's
    weights of the model were trained with (auto: timm with --pretrained and its number of channels,
    else measured)."""
    holdout: int = 128
    """Images kept out of training to measure on: of the val split, or else of the data."""
    max_unreadable: float = 0.1
    """Stop when more than this share of the images cannot be read."""

    seed: int = 0
    """Of weights, order, crops and masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Compile student and teacher (auto: on a GPU, where it pays)."""
    checkpoint_activations: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them: less
    memory, about a third more time."""
    workers: int | None = None
    """Processes that load images (default: one per spare core, at most 16)."""
    cache: Literal["auto", "true", "false"] = "auto"
    """Keep decoded images in memory that the loading processes share; auto: where all of them fit
    into a quarter of the available memory. Views are the same with and without."""
    log_every: int = 10
    """Steps between two readings of the losses."""
    tracker: TrackerName = "none"
    """Track the run in Weights & Biases or in MLflow as well (`pip install 'hpm[wandb]'` or
    `'hpm[mlflow]'`); they read their usual environment variables."""
    eval_every: str = "10%"
    """Between two measurements and figures on the held-out images."""
    probe: str | None = None
    """Labelled images (see eval) to probe the features on while training, by kNN and a linear
    probe, judged on a fifth of their training split; the best checkpoint is kept."""
    probe_every: str = "20%"
    """Between two probes."""
    checkpoint_every: str = "5%"
    """Between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest are kept."""

    @property
    def hard_shares(self) -> tuple[float, float]:
        """Share of the hidden patches that are mined, at first and at last."""
        start, end = HARD_SHARES.get(self.mask, (0.0, 0.0))
        if self.hard_share_start is not None:
            start = self.hard_share_start
        return start, end if self.hard_share_end is None else self.hard_share_end

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up, once the config is resolved."""
        assert self.base_lr is not None, "the config is not resolved"
        return self.base_lr * self.global_batch_size / 256

    @property
    def global_batch_size(self) -> int:
        """Images per step over all processes, once the config is resolved."""
        assert self.batch_size is not None, "the config is not resolved"
        return self.batch_size


# May differ between a run and its continuation: none of them changes what is learned.
FREE_OPTIONS = {
    "out", "device", "workers", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    "max_unreadable", "tracker", "probe", "probe_every", "compile", "checkpoint_activations",
    "cache",
}  # fmt: skip


@dataclass
class ReportConfig:
    """Write the report of a run again, from what is in its folder."""

    run: str
    """Run folder."""
    out: str | None = None
    """File to write (default: report.html in the run folder)."""


@dataclass
class EvalConfig:
    """What every evaluation takes."""

    run: str
    """Run folder, checkpoint or backbone file; weights of published HPM, MAE, timm's or Hugging
    Face's ViT; or timm/NAME, timm's own weights."""
    data: str
    """Images, labelled for all but hardness and stats (see pretrain); with splits train and val
    (or test), or else a fifth is held out."""
    test: str | None = None
    """Images to test on, where they are not a split of the data."""
    compare: str | None = None
    """A second run; the differences are given with their intervals."""
    teacher: bool = False
    """Use the teacher's weights (run or checkpoint only)."""
    baselines: bool = True
    """Measure random weights of the same architecture, and raw pixels, as well."""
    out: str | None = None
    """Folder for the numbers (default: evals/ in the run folder)."""
    crop_share: float = 1.0
    """Share of each image's shorter side that is evaluated, around the centre: 1 for all of it;
    0.875, as published for ImageNet, resizes it to image_size / 0.875 and cuts the centre out."""
    batch_size: int = 128
    """Images at a time."""
    workers: int | None = None
    """Processes that load images (default: one per spare core, at most 16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Of the random weights, held-out parts, batches and masks."""


@dataclass
class LabelledEvalConfig(EvalConfig):
    """What every evaluation with labels takes."""

    train_share: float = 1.0
    """Share of each class's training images that is used: 0.01 and 0.1 are the usual few-label
    settings."""
    max_unreadable: float = 0.1
    """Stop when more than this share of the images cannot be read."""


@dataclass
class FrozenConfig(EvalConfig):
    """What every evaluation of frozen features takes."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's products: bfloat16 is for speed on a GPU (the probes themselves stay in
    float32)."""


@dataclass
class KnnConfig(FrozenConfig, LabelledEvalConfig):
    """Nearest neighbours of frozen features."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; those larger than the training set are left out."""
    temperature: float = 0.07
    """Of the neighbours' weights, exp(similarity / temperature)."""


@dataclass
class LinearConfig(FrozenConfig, LabelledEvalConfig):
    """Linear probe on frozen features: a grid of settings at once, chosen on a held-out part of
    the training set."""

    augment: bool = False
    """Train on a random crop and flip of each image, anew in each epoch (as MAE does), instead of
    on features computed once."""
    lr: tuple[float, ...] = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
    """Learning rates of the grid, per 256 images of a batch."""
    weight_decay: tuple[float, ...] = (0.0, 1e-2, 1e-1)
    """Weight decays of the grid."""
    epochs: int = 90
    """Passes over the training features."""
    probe_batch_size: int = 1024
    """Features per step (at most a sixteenth of the training set, or 32)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """With augment: smallest and largest area of a crop, as a share of the image."""


@dataclass
class AttentiveConfig(FrozenConfig, LabelledEvalConfig):
    """Attentive probe on frozen features: one learned query pools the patches."""

    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates of the grid."""
    weight_decay: tuple[float, ...] = (0.05,)
    """Weight decays of the grid."""
    epochs: int = 40
    """Passes over the training images."""
    probe_batch_size: int = 256
    """Images per step (at most a sixteenth of the training set, or 32)."""
    cache_gb: float = 8.0
    """Patches are kept in memory up to this size, or else computed anew in each epoch."""


@dataclass
class FinetuneConfig(LabelledEvalConfig):
    """Train the whole encoder with labels (the recipe of DeiT and MAE)."""

    baselines: bool = False
    """Train random weights of the same architecture as well, a second training in full, and a
    linear layer on raw pixels (unlike the other evaluations, only where asked for)."""
    batch_size: int = 256
    """Images per optimiser step, over all processes."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another, to save memory."""
    epochs: int = 100
    """Passes over the training images."""
    image_size: int | tuple[int, int] | None = None
    """Pixels (default: as pre-trained); positions are interpolated."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the patches, or the class token."""
    base_lr: float = 5e-4
    """Peak learning rate per 256 images of a batch."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup: str = "5%"
    """Linear warm-up of the learning rate."""
    layer_decay: float = 0.8
    """Factor of the learning rate from each layer to the one below."""
    weight_decay: float = 0.05
    """Of AdamW, on all but 1-D parameters and tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    drop_path: float = 0.1
    """Stochastic depth of the last block."""
    label_smoothing: float = 0.1
    """Share of each label that is spread over all classes."""
    mixup: float = 0.8
    """alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """alpha of cutmix; 0 for none."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, as timm writes it; none for none."""
    random_erase: float = 0.25
    """Probability of random erasing."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a share of the image."""
    flip: bool | Flip = True
    """Mirror half of the images: horizontally (or true), vertically (which suits images without an
    up and down, from the air or a microscope), both, or none (or false)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    checkpoint_every: str = "5%"
    """Between two checkpoints, from which the same command goes on."""


@dataclass
class StatsConfig(FrozenConfig):
    """Features without labels: effective rank, likeness of patches, ranking accuracy."""

    images: int = 10_000
    """Images to measure on, drawn at random; all if there are fewer."""


@dataclass
class HardnessConfig(EvalConfig):
    """Does the predictor know what is hard?"""

    images: int = 256
    """Images to measure on, drawn at random; all if there are fewer."""


PROTOCOLS: dict[str, type[EvalConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "attentive": AttentiveConfig,
    "finetune": FinetuneConfig,
    "stats": StatsConfig,
    "hardness": HardnessConfig,
}


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


@dataclass
class ExportConfig:
    """Hand the backbone over to other software, checked to give the same outputs there."""

    run: str
    """Run folder, checkpoint, backbone file, what --init takes, or timm/NAME."""
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
    crop_share: float = 1.0
    """Of hf, for its preprocessing: as in the evaluations."""
    licence: str | None = None
    """Of the weights, for the model card: apache-2.0, cc-by-nc-4.0, ..."""


@dataclass
class AblateConfig(PretrainConfig):
    """Pre-train with some options changed, over seeds, and compare (all options of pretrain)."""

    arm: tuple[str, ...] = ()
    """A set of options to compare: mae, predictor, hpm, hpm_memory, or your own, `NAME: mask=random
    predictor_loss=none`; may be given several times. The others are compared with the first."""
    vary: tuple[str, ...] = ()
    """An option and its values, `mask=random,easy_to_hard`; may be given several times: every
    combination is run, with every arm."""
    seeds: int = 3
    """How many seeds, from --seed on."""
    labels: str | None = None
    """Labelled images for kNN and linear probe (default: the data, where it has labels)."""


@dataclass
class BenchConfig(PretrainConfig):
    """What a training step costs: MAE and HPM in turns, on noise, phase by phase (all options of
    pretrain; those that say how patches are mined and losses predicted are HPM's alone)."""

    data: str = "demo"
    """Not looked at."""
    out: str = ""
    """Not written to."""
    batch_size: int | None = 64
    """Images per optimiser step."""
    repeats: int = 5
    """Rounds, each of MAE, HPM and a matrix product."""
    steps_each: int = 3
    """Steps of each method in a round."""
    json: str | None = None
    """File for the numbers."""


@dataclass
class BenchDataConfig:
    """How fast images are loaded, for 1, 2, ... workers, against the bare libraries; what limits
    it."""

    data: str
    """Images (see pretrain); of the training split."""
    image_size: int | tuple[int, int] = 224
    """As in pretrain."""
    channels: int = 3
    """As in pretrain."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """As in pretrain."""
    batch_size: int = 64
    """Images that a worker hands over at a time."""
    workers: int | None = None
    """Most workers to try (default: as many as cores)."""
    images_per_second: float | None = None
    """Speed of a training: how many workers does it need?"""
    images: int = 1024
    """Images in each reading."""
    repeats: int = 3
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
    codes: int = 512
    """Number of tokens."""
    image_size: int | tuple[int, int] = 224
    """Pixels, as in pre-training."""
    patch_size: int | tuple[int, int] = 16
    """Pixels, as in pre-training."""
    channels: int = 3
    """As in pre-training."""
    images: int = 10_000
    """Images to learn from, drawn at random; all if there are fewer."""
    patches: int = 200_000
    """Patches to learn from, drawn at random."""
    rounds: int = 100
    """Most rounds of k-means."""
    workers: int = 0
    """Processes that load images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Of what is drawn, and of the first codes."""


@dataclass
class PrepareConfig:
    """Shrink images once into large files that are fast to read, for pretrain and eval."""

    data: str
    """Images (see pretrain), with their splits and labels."""
    out: str
    """Folder to write, to be named as --data; the same command again goes on where it stopped."""
    size: int = 512
    """Pixels of the shorter side that larger images are reduced to. 512 leaves even a crop of a
    fifth of the area 224 pixels; 256 is smaller and faster."""
    quality: int = 90
    """Of the JPEG that reduced images are written as; others are kept as they are."""
    channels: int = 3
    """Of .npy and TIFF, as in pretrain."""
    workers: int | None = None
    """Processes (default: one per spare core, at most 16)."""


@dataclass
class DemoConfig:
    """The whole tour on built-in images: pre-train, measure, draw. Minutes on a CPU."""

    out: str = "runs/demo"
    """Run folder."""
    steps: int | None = None
    """Optimiser steps, instead of the preset's."""


Config = TypeVar("Config")


def make_config(cls: type[Config], options: dict[str, Any]) -> Config:
    """A config from keyword arguments, their names and types checked. Raises UserError."""
    hints = typing.get_type_hints(cls)
    for name in options:
        if name not in hints:
            raise UserError(f"unknown option '{name}'{nearest(name, hints)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in options and field.default is dataclasses.MISSING:
            raise UserError(f"{field.name} is missing")
    return cls(**{name: _typed(name, value, hints[name]) for name, value in options.items()})


def lay_over(preset: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options on top of those of a preset. Steps and epochs are two ways to give one length:
    that of the options replaces either of the preset. Raises UserError where they give both."""
    if None not in (options.get("steps"), options.get("epochs")):
        raise UserError(
            f"steps is {options['steps']} and epochs is {options['epochs']}: pass only one of them"
        )
    if options.get("epochs") is not None:
        options = {"steps": None} | options
    return preset | options


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its type wants it: YAML has no tuples and takes 1e-3 for text."""
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        if value not in known:
            words = [str(k) for k in known]
            raise UserError(
                f"{name} is '{value}'{nearest(str(value), words)} (one of {', '.join(words)})"
            )
        return value
    if isinstance(value, list):
        value = tuple(value)
    if float in (hint, *typing.get_args(hint)) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, Path) and str in (hint, *typing.get_args(hint)):
        value = str(value)
    if not _fits(value, hint):
        raise UserError(f"{name} cannot be {value!r}: it must be {_expected(hint)}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_fits(v, a) for v, a in zip(value, arguments, strict=True))
        )
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    """A type in words, such as `a whole number or a list such as [1, 2]`."""
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return "a list such as [1, 2]" if str not in arguments else "a list of words"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    return " or ".join(_expected(kind) for kind in arguments if kind is not type(None))


def preset_path(name: str | Path) -> Path:
    """A YAML file, or the preset of that name installed with the package."""
    name = str(name)
    if Path(name).is_file():
        return Path(name)
    presets = {p.stem: p for p in PRESETS.glob("*.yaml")}
    if name not in presets:
        known = ", ".join(sorted(presets))
        raise UserError(f"no preset or file '{name}'{nearest(name, presets)} (presets: {known})")
    return presets[name]


def read_preset(name: str | Path) -> dict[str, Any]:
    """The options of a preset or YAML file."""
    try:
        return yaml.safe_load(preset_path(name).read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """One number for both axes, or (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def secondary_mask_ratio(config: PretrainConfig) -> float:
    """Share of the visible patches that are covered: that asked for, or the mask's own."""
    if config.secondary_mask_ratio is None:
        return 0.25 if config.mask == "uniform" else 0.0
    return config.secondary_mask_ratio


def resolve_model(config: PretrainConfig) -> dict[str, Any]:
    """Everything that fixes the architecture: plain numbers, as stored beside the weights."""
    encoder = _timm_shape(config) if config.model.startswith(TIMM) else {}
    width = encoder.get("embed_dim")
    size = nearest_size(width) if width else SIZES[config.model]
    own = {"embed_dim": size.embed_dim, "depth": size.depth, "num_heads": size.num_heads}
    return (encoder or own) | {
        "image_size": list(pair(config.image_size)),
        "patch_size": list(pair(config.patch_size or encoder.get("patch_size", size.patch_size))),
        "channels": config.channels,
        "decoder_dim": config.decoder_dim or size.decoder_dim,
        "decoder_depth": config.decoder_depth or size.decoder_depth,
        "decoder_heads": config.decoder_heads or size.decoder_heads,
        "with_predictor": config.predictor_loss != "none",
        "predictor_dim": config.predictor_dim or config.decoder_dim or size.decoder_dim,
        "predictor_depth": config.predictor_depth or config.decoder_depth or size.decoder_depth,
        "predictor_heads": config.predictor_heads or config.decoder_heads or size.decoder_heads,
        "predictor_head": config.predictor_head,
        "detach_predictor": config.predictor_detach,
        "with_cover": bool(secondary_mask_ratio(config)),
    }


def nearest_size(embed_dim: int) -> ModelSize:
    """Ours of the nearest width: its decoders serve encoders that are not ours."""
    return min(SIZES.values(), key=lambda size: abs(size.embed_dim - embed_dim))


def _timm_shape(config: PretrainConfig) -> dict[str, Any]:
    """What the architecture says of a timm model. UserError where it cannot be used."""
    from hpm.models.timm_encoder import timm_shape

    shape = dict(timm_shape(config.model.removeprefix(TIMM)))
    patch_size = config.patch_size
    if shape.pop("fixed") and patch_size and pair(patch_size) != shape["patch_size"]:
        height, width = shape["patch_size"]
        raise UserError(
            f"patch_size is {patch_size}, but the mask units of {config.model} are of {height} x "
            f"{width} pixels: leave --patch-size out"
        )
    return {"model": config.model} | shape

"""Every option on one page: one typed dataclass per verb, read by the command line and by Python.

A duration is written as text with its unit, `40 epochs`, `500 steps` or `5%` (of the training), and
is converted to steps once, by `schedule.py`."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpm.core.options import describe, option

# The masks that mine, and the share of the hidden patches that are mined (the others are drawn at
# random), at first and last.
HARD_SHARES: dict[str, tuple[float, float]] = {
    "easy_to_hard": (0.0, 0.5),
    "hard_to_easy": (0.5, 0.0),
    "moderate": (0.5, 0.5),
    "hardest": (1.0, 1.0),
    "easiest": (1.0, 1.0),
    "attention": (1.0, 1.0),
}

HardShareSchedule = Literal["linear", "cosine", "constant"]

TargetName = Literal["normalized_pixels", "pixels", "hog", "teacher", "frozen", "tokens"]

RankingSignal = Literal["target", "pixels", "normalized_pixels"]

PredictorLoss = Literal["relative", "absolute", "none"]

TrackerName = Literal["none", "wandb", "mlflow"]

TIMM = "timm/"

Flip = Literal["none", "horizontal", "vertical", "both"]


@dataclass
class DataOptions:
    """Data and output."""

    data: str
    """Images: a folder (searched recursively), a list file (`path label` per line), a parquet file
    or folder, or `demo`, the built-in images. Where it has a train and a val (or test) split,
    training uses train alone."""
    out: str = option(may_change=True)
    """Run folder. The same command again continues an interrupted run."""


@dataclass
class ModelOptions:
    """Model."""

    model: str = option("vit_small", main=True)
    """Encoder: vit_nano, vit_tiny, vit_small, vit_base, vit_large or vit_huge; or timm/NAME, a
    plain Vision Transformer or a Hiera of timm. Its decoders are sized to match (for timm's: those
    of our size with the nearest width)."""
    pretrained: bool = False
    """Start from timm's weights of a timm/NAME; images are then normalised as they were for these
    (see normalize)."""
    image_size: int | tuple[int, int] = option(224, main=True)
    """Pixels, one number or [height, width]."""
    patch_size: int | tuple[int, int] | None = option(None, main=True)
    """Pixels, one number or [height, width]; usually 16 (14 for vit_huge; timm's as they are)."""
    channels: int = option(3, at_least=1, at_most=32)
    """1: grey, 3: RGB, 4: RGBA; up to 32 in TIFF and .npy."""
    decoder_dim: int | None = option(None, at_least=1)
    """Width of the reconstructor and of the predictor (default: by model)."""
    decoder_depth: int | None = option(None, at_least=1)
    """Blocks of each decoder (default: by model)."""
    decoder_heads: int | None = option(None, at_least=1)
    """Attention heads of each decoder (default: by model)."""


@dataclass
class MaskOptions:
    """Masks and mining."""

    mask: str = "easy_to_hard"
    """Which patches to hide. By the teacher's predicted losses: the hardest more and more
    (easy_to_hard) or less and less (hard_to_easy), a fixed share of them (moderate), always the
    hardest or the easiest. By the teacher's attention of the class token: attention. By chance:
    random, block (one square), multi_block, uniform (one visible in each 2x2 patches), or noise of
    a colour, from large to small blobs: red_noise, green_noise, purple_noise, blue_noise. Or a
    mask of your own, MODULE:FUNCTION, or the name that its package registers."""
    mask_ratio: float = option(0.75, above=0, below=1, main=True)
    """Share of the patches that is hidden, between 0 and 1."""
    secondary_mask_ratio: float | None = option(None, at_least=0, below=1)
    """Share of the visible patches whose content is replaced by a learned one (default: 0.25 for
    mask uniform, else none)."""
    hard_share_start: float | None = option(None, at_least=0, at_most=1)
    """Share of the hidden patches that are mined when training starts (alpha_0; default: by mask,
    0 for easy_to_hard)."""
    hard_share_end: float | None = option(None, at_least=0, at_most=1)
    """The same when training ends (alpha_T; default: by mask, 0.5 for easy_to_hard)."""
    hard_share_schedule: HardShareSchedule = "linear"
    """How the share goes from the one to the other; constant: as at the end, throughout."""
    hard_share_by: Literal["step", "epoch"] = "step"
    """When the share changes: at every step, or once an epoch (the paper)."""
    mining_temperature: float = option(0.0, at_least=0)
    """0 mines the patches of the highest signal. Above, the mined patches are drawn at random, with
    probabilities that rise with the signal: the higher the temperature, the less they do."""
    mask_unit: int = option(1, at_least=1)
    """Mine and hide units of so many patches along each axis instead of single patches."""
    mine_by: Literal["teacher", "memory", "progress"] = "teacher"
    """What says how hard a patch is. teacher: its prediction. memory: the losses that the student
    had at that place of that image in earlier epochs; it costs next to nothing and needs no
    predictor. progress: as memory, but by how much the loss there has fallen of late."""
    mine_every: int = option(1, at_least=1)
    """Steps from one prediction of the teacher to the next. In between the patches are mined by
    what it last predicted of the same images; those it was never asked about are hidden at
    random."""
    teacher_view: Literal["full", "masked"] = "full"
    """What the teacher sees when it predicts losses: the whole image (the paper), or images masked
    as the student's, as few as hide every patch once: what the predictor was trained on."""
    teacher_scale: float = option(1.0, above=0, at_most=1)
    """Size of the images that the teacher predicts losses of, as a share of image_size: 0.5 costs
    about a quarter."""


@dataclass
class TargetOptions:
    """Target."""

    target: TargetName | str = "normalized_pixels"
    """What is reconstructed: pixels standardised within their patch, raw pixels, histograms of
    oriented gradients (hog), the EMA teacher's features, a frozen model's features, or the tokens
    of a codebook. A target of your own: its entry point in the group hpm.targets, or
    my_module:MyTarget."""
    target_options: tuple[str, ...] = ()
    """Of a target of your own: its options, as name=value,name=value."""
    target_model: str | None = None
    """Of target frozen: timm/NAME, hf/NAME (hf/facebook/dino-vits16), or a folder."""
    codebook: str | None = None
    """Of target tokens: the file that `hpm tokenize` wrote."""
    ranking_signal: RankingSignal = "target"
    """Of pixel targets: the loss that the predictor ranks by, in raw or in normalised pixels."""


@dataclass
class PredictorOptions:
    """Loss predictor."""

    predictor_loss: PredictorLoss = "relative"
    """How the predictor learns: from pairwise order, by regression, or not at all (plain MAE
    together with --mask random)."""
    predictor_weight: float = option(1.0, at_least=0)
    """Weight of the predictor's loss beside the reconstruction's."""
    predictor_detach: bool = False
    """Keep the predictor's loss from training the encoder."""
    predictor_dim: int | None = option(None, at_least=1)
    """Width of the predictor (default: decoder_dim)."""
    predictor_depth: int | None = option(None, at_least=1)
    """Blocks of the predictor (default: decoder_depth)."""
    predictor_heads: int | None = option(None, at_least=1)
    """Attention heads of the predictor (default: decoder_heads)."""
    predictor_head: Literal["patch", "scalar"] = "patch"
    """Output of the predictor: the mean of as many values as the patch has pixels (the paper), or
    one number."""


@dataclass
class TrainingOptions:
    """Training."""

    epochs: int = option(100, at_least=1, main=True)
    """Passes over the training images."""
    steps: int | None = option(None, at_least=1)
    """Optimiser steps, instead of epochs."""
    batch_size: int | None = option(None, at_least=1, main=True)
    """Images per optimiser step, over all processes (default: 256, or as many as there are)."""
    accumulate: int = option(1, at_least=1)
    """Parts that a batch is cut into, one after another, to save memory."""
    base_lr: float | None = option(None, at_least=0)
    """Peak learning rate per 256 images of a batch (default: by the number of steps; 1.5e-4, the
    paper's, from 100,000 on)."""
    warmup: str = option("10%", duration=True)
    """Linear warm-up of the learning rate."""
    weight_decay: float = option(0.05, at_least=0)
    """Of AdamW, on all but 1-D parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    clip_grad: float = option(5.0, at_least=0)
    """Largest norm of the gradient."""
    ema_horizon_start: str = option("0.8%", duration=True)
    """How far back the teacher's average reaches at first: decay = 1 - 1 / horizon in steps. The
    defaults are what the paper's 0.999 and 0.9999 are on ImageNet."""
    ema_horizon_end: str = option("8%", duration=True)
    """The same after the ramp."""
    ema_ramp: str = option("50%", duration=True)
    """How long the decay rises for."""
    init: str | None = option(None, main=True)
    """Start from the weights of another run or weights file (not for resuming), also of published
    HPM, MAE, timm's or Hugging Face's ViT; another image or patch size is resampled to."""
    init_partial: bool = False
    """Accept an --init file that has only some of the tensors."""
    init_teacher: bool = False
    """Start from the teacher's (EMA) weights of the --init file."""
    seed: int = option(0, at_least=0, main=True)
    """Of weights, order, crops and masks."""


@dataclass
class ImageOptions:
    """Images."""

    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop, as a share of the image."""
    flip: bool | Flip = True
    """Mirror half of the images: horizontally (or true), vertically (which suits images without an
    up and down, from the air or a microscope), both, or none (or false)."""
    repeat_augment: int = option(1, at_least=1)
    """Views of each image in a batch, decoded once, each with a crop, a flip and a mask of its own
    (repeated augmentation). They count as images: a batch holds that many times fewer different
    ones, an epoch is as many steps as without, and to go through all images takes that many
    epochs."""
    normalize: Literal["auto", "measured", "imagenet", "timm"] = "auto"
    """Mean and deviation of the channels: measured from the data, ImageNet's, or those that timm's
    weights of the model were trained with (auto: timm with --pretrained and its number of channels,
    else measured)."""
    holdout: int = option(128, at_least=0)
    """Images kept out of training to measure on: of the val split, or else of the data."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1, may_change=True)
    """Stop when more than this share of the images cannot be read."""


@dataclass
class MachineOptions:
    """Machine."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", may_change=True)
    """Where to train."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    compile: Literal["auto", "true", "false"] = option("auto", may_change=True)
    """Compile student and teacher (auto: on a GPU, where it pays)."""
    checkpoint_activations: bool = option(False, may_change=True)
    """Compute the blocks' activations again in the backward pass instead of keeping them: less
    memory, about a third more time."""
    workers: int | None = option(None, at_least=0, may_change=True)
    """Processes that load images (default: one per spare core, at most 16)."""
    cache: Literal["auto", "true", "false"] = option("auto", may_change=True)
    """Keep decoded images in memory that the loading processes share; auto: where all of them fit
    into a quarter of the available memory. Views are the same with and without."""


@dataclass
class RecordOptions:
    """Log, evaluation and checkpoints."""

    log_every: int = option(10, at_least=1, may_change=True)
    """Steps between two readings of the losses."""
    tracker: TrackerName = option("none", may_change=True)
    """Track the run in Weights & Biases or in MLflow as well (`pip install 'hpm[wandb]'` or
    `'hpm[mlflow]'`); they read their usual environment variables."""
    eval_every: str = option("10%", duration=True, may_change=True)
    """Between two measurements and figures on the held-out images."""
    probe: str | None = option(None, may_change=True)
    """Labelled images (see eval) to probe the features on while training, by kNN and a linear
    probe, judged on a fifth of their training split; the best checkpoint is kept."""
    probe_every: str = option("20%", duration=True, may_change=True)
    """Between two probes."""
    checkpoint_every: str = option("5%", duration=True, may_change=True)
    """Between two checkpoints."""
    keep_checkpoints: int = option(2, at_least=1, may_change=True)
    """How many of the latest are kept."""


@dataclass
class PretrainConfig(
    RecordOptions,
    MachineOptions,
    ImageOptions,
    TrainingOptions,
    PredictorOptions,
    TargetOptions,
    MaskOptions,
    ModelOptions,
    DataOptions,
):
    """Pre-train a Vision Transformer on unlabelled images."""

    @property
    def hard_shares(self) -> tuple[float, float]:
        """Share of the hidden patches that are mined, at first and at last."""
        start, end = HARD_SHARES.get(self.mask, (0.0, 0.0))
        if self.hard_share_start is not None:
            start = self.hard_share_start
        return start, end if self.hard_share_end is None else self.hard_share_end

    @property
    def mines_by_memory(self) -> bool:
        """Whether the student's losses of earlier epochs are mined by, instead of a prediction."""
        return self.mine_by != "teacher"

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


def may_change(name: str) -> bool:
    """Whether an interrupted run may go on with another value of an option: it then has no
    influence on what is learned."""
    return describe(PretrainConfig)[name].rules.may_change


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


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One number for both axes, or (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def secondary_mask_ratio(config: PretrainConfig) -> float:
    """Share of the visible patches that are covered: that asked for, or the mask's own."""
    if config.secondary_mask_ratio is None:
        return 0.25 if config.mask == "uniform" else 0.0
    return config.secondary_mask_ratio

"""The options of `hpm pretrain`, read by the command line and by Python alike. `start_options.py`
has those about the weights to start from, `run_options.py` those about the machine and the records.

A duration is written as text with its unit, `40 epochs`, `500 steps` or `5%` (of the training), and
is converted to steps once, by `hpm.training.schedule`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpm.core.choices import (
    HARD_SHARES,
    Flip,
    HardShareSchedule,
    PatchSize,
    Positions,
    PredictorLoss,
    RankingSignal,
    TargetName,
    Tubes,
)
from hpm.core.options import LARGEST_SEED, option
from hpm.core.run_options import MachineOptions, RecordOptions
from hpm.core.start_options import StartOptions


@dataclass
class DataOptions:
    """Data and output."""

    data: str
    """Training images or videos: a folder (searched recursively), a list file (`path label` per
    line, csv or tsv), parquet, an Arrow or LitData folder, hf://user/name, WebDataset archives
    (path, http:// or s3://), `demo` or `demo-video`, or MODULE:FUNCTION of your own; or several of
    these, separated by commas. If there is a train split, only that is used."""
    out: str = option(path=True, may_change=True)
    """Run folder. Run the same command again to resume an interrupted run."""


@dataclass
class ModelOptions:
    """Model."""

    model: str = option("vit_small", main=True)
    """Encoder: vit_nano, vit_tiny, vit_small, vit_base, vit_large, vit_huge, or timm/NAME for a
    plain Vision Transformer or Hiera from timm. An encoder of your own: MODULE:CLASS, or the name
    of an entry point in the group hpm.encoders. The decoders are sized to match."""
    image_size: int | tuple[int, int] = option(224, main=True)
    """Image size in pixels: one number, or height,width."""
    patch_size: int | PatchSize | None = option(None, at_least=1, main=True)
    """Patch size in pixels: one number, height,width, or for clips frames,height,width (default:
    16, 14 for vit_huge, or that of timm/NAME; 2 frames)."""
    channels: int = option(3, at_least=1, at_most=32)
    """Number of image channels: 1 for grey, 3 for RGB, 4 for RGBA, up to 32 for TIFF and .npy."""
    positions: Positions = "sincos"
    """Fixed sine-cosine positions: of each axis (sincos, MAE) or of the patch's number (sincos_1d,
    VideoMAE)."""
    class_token: bool = True
    """Give the encoder a class token; VideoMAE has none."""
    class_tokens: int = option(1, at_least=1)
    """Number of class tokens; their mean is the feature of the image. Pixio has 8."""
    decoder: Literal["standard", "deep"] = "standard"
    """Depth of the reconstructor: standard depends on the model, deep has four times as many
    blocks, as Pixio. The loss predictor is the same for both."""
    decoder_dim: int | None = option(None, at_least=1)
    """Width of the reconstructor and the loss predictor (default: depends on the model)."""
    decoder_depth: int | None = option(None, at_least=1)
    """Number of blocks in each decoder (default: depends on model and decoder)."""
    decoder_heads: int | None = option(None, at_least=1)
    """Number of attention heads in each decoder (default: depends on the model)."""


@dataclass
class VideoOptions:
    """Video."""

    frames: int = option(1, at_least=1)
    """Number of frames per clip of a video; 1 for images."""
    frame_stride: int = option(4, at_least=1)
    """Number of the video's frames from one frame of a clip to the next, counted by time stamps."""
    mine_tubes: Tubes = "none"
    """Mine whole tubes, the patches at one place at all times of a clip, by the mean or maximum of
    their predicted losses. none mines single patches."""
    decoder_keep: float = option(1.0, above=0, at_most=1)
    """Fraction of the hidden patches that the decoders reconstruct, chosen by running cells
    (VideoMAE V2). 0.5 about halves the decoders' cost."""


@dataclass
class MaskOptions:
    """Masking and mining."""

    mask: str = "easy_to_hard"
    """Masking strategy. Mined by the teacher's predicted loss: easy_to_hard and hard_to_easy (the
    share of mined patches rises or falls during training), moderate (fixed share), hardest,
    easiest. Mined by the teacher's attention: attention. Drawn at random: random, tube (of clips,
    places at all times), block (one square), multi_block (several rectangles), uniform (one visible
    patch in each 2x2 cell), and filtered noise from coarse to fine: red_noise, green_noise,
    purple_noise, blue_noise. Your own: MODULE:FUNCTION, or an entry point of hpm.masks."""
    mask_ratio: float = option(0.75, above=0, below=1, main=True)
    """Fraction of the patches to hide."""
    secondary_mask_ratio: float | None = option(None, at_least=0, below=1)
    """Fraction of the visible patches to replace by a learned token (default: 0.25 for mask
    uniform, else 0)."""
    hard_share_start: float | None = option(None, at_least=0, at_most=1)
    """Fraction of the hidden patches that are mined at the start of training; alpha_0 in the paper
    (default: depends on the mask; 0 for easy_to_hard)."""
    hard_share_end: float | None = option(None, at_least=0, at_most=1)
    """Fraction of the hidden patches that are mined at the end of training; alpha_T in the paper
    (default: depends on the mask; 0.5 for easy_to_hard)."""
    hard_share_schedule: HardShareSchedule = "linear"
    """Schedule from hard_share_start to hard_share_end; constant uses hard_share_end throughout."""
    hard_share_by: Literal["step", "epoch"] = "step"
    """Update the mined fraction at every step, or once per epoch as in the paper."""
    mining_temperature: float = option(0.0, at_least=0)
    """0 mines the hardest patches. Above 0, mined patches are sampled, the harder ones with higher
    probability; the higher the temperature, the more uniform the probabilities."""
    mask_unit: int = option(1, at_least=1)
    """Mine and hide units of so many patches along each axis instead of single patches. Pixio hides
    units of 4."""
    mine_by: Literal["teacher", "memory", "progress"] = "teacher"
    """Source of the difficulty of patches. teacher: the teacher's predicted loss. memory: the
    student's actual losses on each image in earlier epochs, which costs almost nothing and needs no
    predictor. progress: as memory, but mines where the loss has fallen most recently."""
    mine_every: int = option(1, at_least=1)
    """Number of steps between teacher predictions. In between, masks use a moving average of the
    predictions for each image; images without one are masked at random."""
    teacher_view: Literal["full", "masked"] = "full"
    """Images the teacher sees when it predicts losses: full images (as in the paper), or a few
    masked views that together hide every patch once (matches the predictor's training)."""
    teacher_scale: float = option(1.0, above=0, at_most=1)
    """Size of the teacher's input relative to image_size. 0.5 costs about a quarter."""


@dataclass
class TargetOptions:
    """Target."""

    target: TargetName | str = "normalized_pixels"
    """Reconstruction target: normalized_pixels (standardised within each patch),
    normalized_channels (within each patch and channel, as VideoMAE), pixels, hog (histograms of
    oriented gradients), teacher (features of the EMA teacher), frozen (features of a frozen model),
    or tokens (indices into a codebook). A target of your own: MODULE:CLASS, or the name of an entry
    point in the group hpm.targets."""
    target_options: tuple[str, ...] = ()
    """Options of a target of your own, as name=value,name=value."""
    target_model: str | None = None
    """Frozen model for --target frozen: timm/NAME, hf/NAME (for example hf/facebook/dino-vits16),
    or a folder."""
    codebook: str | None = None
    """Codebook file for --target tokens, written by `hpm tokenize`."""
    ranking_signal: RankingSignal = "target"
    """Loss that the predictor learns to rank: the loss of the target, or for pixel targets the loss
    on raw or normalised pixels."""


@dataclass
class PredictorOptions:
    """Loss predictor."""

    predictor_loss: PredictorLoss = "relative"
    """Objective of the loss predictor: pairwise ranking (relative), regression (absolute), or none.
    --predictor-loss none --mask random is plain MAE."""
    predictor_weight: float = option(1.0, at_least=0)
    """Weight of the predictor's loss relative to the reconstruction loss."""
    predictor_detach: bool = False
    """Stop the gradient of the predictor's loss at the encoder's output."""
    predictor_dim: int | None = option(None, at_least=1)
    """Width of the loss predictor (default: decoder_dim)."""
    predictor_depth: int | None = option(None, at_least=1)
    """Number of blocks in the loss predictor (default: decoder_depth)."""
    predictor_heads: int | None = option(None, at_least=1)
    """Number of attention heads in the loss predictor (default: decoder_heads)."""
    predictor_head: Literal["patch", "scalar"] = "patch"
    """Output layer of the loss predictor: patch averages one value per pixel and channel of the
    patch (as in the paper), scalar has a single output."""


@dataclass
class TrainingOptions:
    """Training."""

    epochs: int = option(100, at_least=1, main=True)
    """Number of passes over the training images."""
    steps: int | None = option(None, at_least=1)
    """Number of optimiser steps; replaces --epochs."""
    max_hours: float | None = option(None, above=0, main=True)
    """Train for this many hours; replaces --epochs. Some steps are timed first, which fixes the
    number of steps."""
    batch_size: int | None = option(None, at_least=1, main=True)
    """Images per optimiser step, summed over all processes (default: 256, or fewer if there are
    fewer images)."""
    accumulate: int = option(1, at_least=1)
    """Number of gradient accumulation steps that each batch is split into. Saves memory; the batch
    size stays the same."""
    base_lr: float | None = option(None, at_least=0)
    """Peak learning rate per 256 images in a batch: lr = base_lr * batch_size / 256 (default:
    depends on the number of steps; the paper's 1.5e-4 from 100,000 steps on)."""
    stop_after: str | None = option(None, may_change=True)
    """Save and stop after this time, such as 4h or 1d12h, as on SIGTERM. Run the same command again
    to resume."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine, or constant with a linear cooldown at the
    end, which can be prolonged by running the same command again with more --epochs."""
    cooldown: str = option("10%", duration=True)
    """Length of the cooldown at the end of --schedule constant."""
    warmup: str = option("10%", duration=True)
    """Length of the linear learning rate warm-up."""
    weight_decay: float = option(0.05, at_least=0)
    """Weight decay of AdamW. 1-D parameters are excluded."""
    betas: tuple[float, float] = option((0.9, 0.95), at_least=0, below=1)
    """Betas of AdamW."""
    clip_grad: float = option(5.0, at_least=0)
    """Maximum norm of the gradient; 0 clips nothing."""
    ema_horizon_start: str = option("0.8%", duration=True)
    """Averaging horizon of the EMA teacher at the start of training; decay = 1 - 1 / (horizon in
    steps). The defaults correspond to the paper's 0.999 and 0.9999 on ImageNet."""
    ema_horizon_end: str = option("8%", duration=True)
    """Averaging horizon of the EMA teacher after the ramp."""
    ema_ramp: str = option("50%", duration=True)
    """Length of the ramp from ema_horizon_start to ema_horizon_end."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED, main=True)
    """Random seed of the initial weights, data order, crops and masks."""


@dataclass
class ImageOptions:
    """Augmentation and normalisation."""

    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop, as a fraction of the image."""
    flip: bool | Flip = True
    """Flip images at random, with probability 0.5 per axis: horizontal (the default; also true),
    vertical, both, or none (also false). Use both for aerial or microscope images."""
    repeat_augment: int = option(1, at_least=1)
    """Number of views per image in a batch, each with its own crop, flip and mask; the image is
    decoded once. Each view counts as an image of the batch and of the epoch."""
    normalize: Literal["auto", "measured", "imagenet", "timm"] = "auto"
    """Mean and standard deviation of the channels: measured on the data, imagenet, or timm for
    those of the timm model's weights (auto: timm with --pretrained if the number of channels
    matches, else measured)."""
    stream: bool = False
    """Read hf://, parquet, Arrow or LitData in order, as archives are, instead of in any order: for
    data bigger than memory or disk."""
    shuffle: int = option(512, at_least=1)
    """Images of a stream that each worker shuffles; twice as many are in its memory."""
    holdout: int = option(128, at_least=0)
    """Number of images to keep out of training for measurements and figures; taken from the val
    split if there is one, else at most a tenth of the images."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1, may_change=True)
    """Stop if more than this fraction of the images cannot be read."""


@dataclass
class PretrainConfig(
    RecordOptions,
    MachineOptions,
    ImageOptions,
    StartOptions,
    TrainingOptions,
    PredictorOptions,
    TargetOptions,
    MaskOptions,
    VideoOptions,
    ModelOptions,
    DataOptions,
):
    """Pre-train a Vision Transformer on unlabelled images."""

    @property
    def hard_shares(self) -> tuple[float, float]:
        """Shares of the hidden patches that are mined, at the start and at the end of training."""
        start, end = HARD_SHARES.get(self.mask, (0.0, 0.0))
        if self.hard_share_start is not None:
            start = self.hard_share_start
        return start, end if self.hard_share_end is None else self.hard_share_end

    @property
    def mines_by_memory(self) -> bool:
        """Whether mining uses the student's losses in earlier epochs instead of a prediction."""
        return self.mine_by != "teacher"

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up. The config must be resolved."""
        assert self.base_lr is not None, "the config is not resolved"
        return self.base_lr * self.global_batch_size / 256

    @property
    def global_batch_size(self) -> int:
        """Images per step over all processes. The config must be resolved."""
        assert self.batch_size is not None, "the config is not resolved"
        return self.batch_size


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One number for both axes, or (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def secondary_mask_ratio(config: PretrainConfig) -> float:
    """Share of the visible patches that are covered: the option, or else the mask's own default."""
    if config.secondary_mask_ratio is None:
        return 0.25 if config.mask == "uniform" else 0.0
    return config.secondary_mask_ratio

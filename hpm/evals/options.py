"""Options of the evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.core.config import Flip
from hpm.core.options import option


@dataclass
class EvalConfig:
    """What every evaluation takes."""

    run: str
    """Run folder, checkpoint or backbone file; weights of published HPM, MAE, timm's or Hugging
    Face's ViT; or timm/NAME, timm's own weights."""
    data: str
    """Images, labelled for all but hardness and stats (see pretrain); with splits train and val
    (or test), or else a fifth is held out."""
    test: str | None = option(None, main=True)
    """Images to test on, where they are not a split of the data."""
    compare: str | None = option(None, main=True)
    """A second run; the differences are given with their intervals."""
    teacher: bool = option(False, main=True)
    """Use the teacher's weights (run or checkpoint only)."""
    baselines: bool = True
    """Measure random weights of the same architecture, and raw pixels, as well."""
    out: str | None = None
    """Folder for the numbers (default: evals/ in the run folder)."""
    crop_share: float = option(1.0, above=0, at_most=1)
    """Share of each image's shorter side that is evaluated, around the centre: 1 for all of it;
    0.875, as published for ImageNet, resizes it to image_size / 0.875 and cuts the centre out."""
    batch_size: int = option(128, at_least=1)
    """Images at a time."""
    workers: int | None = option(None, at_least=0)
    """Processes that load images (default: one per spare core, at most 16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = option(0, at_least=0)
    """Of the random weights, held-out parts, batches and masks."""


@dataclass
class LabelledEvalConfig(EvalConfig):
    """What every evaluation with labels takes."""

    train_share: float = option(1.0, above=0, at_most=1)
    """Share of each class's training images that is used: 0.01 and 0.1 are the usual few-label
    settings."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1)
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

    k: tuple[int, ...] = option((10, 20, 100, 200), at_least=1, main=True)
    """Numbers of neighbours; those larger than the training set are left out."""
    temperature: float = option(0.07, above=0)
    """Of the neighbours' weights, exp(similarity / temperature)."""


@dataclass
class LinearConfig(FrozenConfig, LabelledEvalConfig):
    """Linear probe on frozen features: a grid of settings at once, chosen on a held-out part of
    the training set."""

    augment: bool = option(False, main=True)
    """Train on a random crop and flip of each image, anew in each epoch (as MAE does), instead of
    on features computed once."""
    lr: tuple[float, ...] = option((1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), above=0)
    """Learning rates of the grid, per 256 images of a batch."""
    weight_decay: tuple[float, ...] = option((0.0, 1e-2, 1e-1), at_least=0)
    """Weight decays of the grid."""
    epochs: int = option(90, at_least=1)
    """Passes over the training features."""
    probe_batch_size: int = option(1024, at_least=2)
    """Features per step (at most a sixteenth of the training set, or 32)."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """With augment: smallest and largest area of a crop, as a share of the image."""


@dataclass
class AttentiveConfig(FrozenConfig, LabelledEvalConfig):
    """Attentive probe on frozen features: one learned query pools the patches."""

    lr: tuple[float, ...] = option((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), above=0)
    """Learning rates of the grid."""
    weight_decay: tuple[float, ...] = option((0.05,), at_least=0)
    """Weight decays of the grid."""
    epochs: int = option(40, at_least=1)
    """Passes over the training images."""
    probe_batch_size: int = option(256, at_least=2)
    """Images per step (at most a sixteenth of the training set, or 32)."""
    cache_gb: float = option(8.0, above=0)
    """Patches are kept in memory up to this size, or else computed anew in each epoch."""


@dataclass
class FinetuneConfig(LabelledEvalConfig):
    """Train the whole encoder with labels (the recipe of DeiT and MAE)."""

    baselines: bool = False
    """Train random weights of the same architecture as well, a second training in full, and a
    linear layer on raw pixels (unlike the other evaluations, only where asked for)."""
    batch_size: int = option(256, at_least=1, main=True)
    """Images per optimiser step, over all processes."""
    accumulate: int = option(1, at_least=1)
    """Parts that a batch is cut into, one after another, to save memory."""
    epochs: int = option(100, at_least=1, main=True)
    """Passes over the training images."""
    image_size: int | tuple[int, int] | None = option(None, main=True)
    """Pixels (default: as pre-trained); positions are interpolated."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the patches, or the class token."""
    base_lr: float = option(5e-4, at_least=0, main=True)
    """Peak learning rate per 256 images of a batch."""
    min_lr: float = option(1e-6, at_least=0)
    """Learning rate at the end."""
    warmup: str = option("5%", duration=True)
    """Linear warm-up of the learning rate."""
    layer_decay: float = option(0.8, above=0, at_most=1)
    """Factor of the learning rate from each layer to the one below."""
    weight_decay: float = option(0.05, at_least=0)
    """Of AdamW, on all but 1-D parameters and tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    clip_grad: float | None = option(None, at_least=0)
    """Largest norm of the gradient."""
    drop_path: float = option(0.1, at_least=0, below=1)
    """Stochastic depth of the last block."""
    label_smoothing: float = option(0.1, at_least=0, below=1)
    """Share of each label that is spread over all classes."""
    mixup: float = option(0.8, at_least=0)
    """alpha of mixup; 0 for none."""
    cutmix: float = option(1.0, at_least=0)
    """alpha of cutmix; 0 for none."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, as timm writes it; none for none."""
    random_erase: float = option(0.25, at_least=0, below=1)
    """Probability of random erasing."""
    crop_scale: tuple[float, float] = option((0.08, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop, as a share of the image."""
    flip: bool | Flip = True
    """Mirror half of the images: horizontally (or true), vertically (which suits images without an
    up and down, from the air or a microscope), both, or none (or false)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    checkpoint_every: str = option("5%", duration=True)
    """Between two checkpoints, from which the same command goes on."""


@dataclass
class StatsConfig(FrozenConfig):
    """Features without labels: effective rank, likeness of patches, ranking accuracy."""

    images: int = option(10_000, at_least=1)
    """Images to measure on, drawn at random; all if there are fewer."""


@dataclass
class HardnessConfig(EvalConfig):
    """Does the predictor know what is hard?"""

    images: int = option(256, at_least=1)
    """Images to measure on, drawn at random; all if there are fewer."""


PROTOCOLS: dict[str, type[EvalConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "attentive": AttentiveConfig,
    "finetune": FinetuneConfig,
    "stats": StatsConfig,
    "hardness": HardnessConfig,
}

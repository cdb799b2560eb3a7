"""Options of the evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.core.config import Flip
from hpm.core.options import option


@dataclass
class EvalConfig:
    """Options of every evaluation."""

    run: str
    """Run folder, checkpoint or weights file (including published HPM, MAE, timm and Hugging Face
    ViT weights), or timm/NAME for timm's pretrained weights."""
    data: str
    """Images, with labels except for hardness and stats (see pretrain). Tests on the val or test
    split if there is one, else on a fifth of the images."""
    test: str | None = option(None, main=True)
    """Test images, if they are not a split of the data."""
    compare: str | None = option(None, main=True)
    """Second run to compare with; reports paired differences and their confidence intervals."""
    teacher: bool = option(False, main=True)
    """Use the teacher's (EMA) weights (run folder or checkpoint only)."""
    baselines: bool = True
    """Also measure random weights of the same architecture, and raw pixels."""
    out: str | None = None
    """Folder for the results (default: evals/ in the run folder)."""
    crop_share: float = option(1.0, above=0, at_most=1)
    """Fraction of the shorter side that the centre crop keeps. 1 keeps the largest centred box;
    0.875 resizes to image_size / 0.875 first, as is usual for ImageNet."""
    batch_size: int = option(128, at_least=1)
    """Images per forward pass."""
    workers: int | None = option(None, at_least=0)
    """Number of processes that load images (default: one per spare core, at most 16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto uses the GPU if there is one."""
    seed: int = option(0, at_least=0)
    """Random seed of the random-weights baseline, splits, batches and masks."""


@dataclass
class LabelledEvalConfig(EvalConfig):
    """Options of every evaluation with labels."""

    train_share: float = option(1.0, above=0, at_most=1)
    """Fraction of each class's training images to use; 0.01 and 0.1 are the usual few-label
    settings."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1)
    """Stop if more than this fraction of the images cannot be read."""


@dataclass
class FrozenConfig(EvalConfig):
    """Options of every evaluation of frozen features."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the backbone; bfloat16 is faster on a GPU. The probes are always trained in
    float32."""


@dataclass
class KnnConfig(FrozenConfig, LabelledEvalConfig):
    """k-nearest-neighbour classification of frozen features."""

    k: tuple[int, ...] = option((10, 20, 100, 200), at_least=1, main=True)
    """Numbers of neighbours. Values larger than the training set are skipped."""
    temperature: float = option(0.07, above=0)
    """Temperature of the votes, exp(similarity / temperature)."""


@dataclass
class LinearConfig(FrozenConfig, LabelledEvalConfig):
    """Linear probe on frozen features; the hyperparameters are chosen on a held-out part of the
    training set."""

    augment: bool = option(False, main=True)
    """Train on random crops and flips, drawn anew in every epoch (as MAE does), instead of on
    features computed once."""
    lr: tuple[float, ...] = option((1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), above=0)
    """Learning rates to try, per 256 images in a batch."""
    weight_decay: tuple[float, ...] = option((0.0, 1e-2, 1e-1), at_least=0)
    """Weight decays to try."""
    epochs: int = option(90, at_least=1)
    """Number of passes over the training features."""
    probe_batch_size: int = option(1024, at_least=2)
    """Features per optimiser step, at most a sixteenth of the training set or 32."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop with --augment, as a fraction of the image."""


@dataclass
class AttentiveConfig(FrozenConfig, LabelledEvalConfig):
    """Attentive probe on frozen features: one learned query pools the patches."""

    lr: tuple[float, ...] = option((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), above=0)
    """Learning rates to try."""
    weight_decay: tuple[float, ...] = option((0.05,), at_least=0)
    """Weight decays to try."""
    epochs: int = option(40, at_least=1)
    """Number of passes over the training images."""
    probe_batch_size: int = option(256, at_least=2)
    """Images per optimiser step, at most a sixteenth of the training set or 32."""
    cache_gb: float = option(8.0, above=0)
    """Maximum memory in GB for cached patch features. If they need more, they are recomputed in
    every epoch."""


@dataclass
class FinetuneConfig(LabelledEvalConfig):
    """Fine-tune the whole encoder with labels, by the recipe of DeiT and MAE."""

    baselines: bool = False
    """Also fine-tune random weights of the same architecture (a second full training), and train a
    linear layer on raw pixels."""
    batch_size: int = option(256, at_least=1, main=True)
    """Images per optimiser step, summed over all processes."""
    accumulate: int = option(1, at_least=1)
    """Number of gradient accumulation steps that each batch is split into. Saves memory; the batch
    size stays the same."""
    epochs: int = option(100, at_least=1, main=True)
    """Number of passes over the training images."""
    image_size: int | tuple[int, int] | None = option(None, main=True)
    """Image size in pixels (default: as in pre-training). Positions are interpolated to other
    sizes."""
    pool: Literal["mean", "cls"] = "mean"
    """Input of the classification head: the mean of the patch tokens, or the class token."""
    base_lr: float = option(5e-4, at_least=0, main=True)
    """Peak learning rate per 256 images in a batch."""
    min_lr: float = option(1e-6, at_least=0)
    """Learning rate at the end of training."""
    warmup: str = option("5%", duration=True)
    """Length of the linear learning rate warm-up."""
    layer_decay: float = option(0.8, above=0, at_most=1)
    """Factor by which the learning rate shrinks from each layer to the one below it."""
    weight_decay: float = option(0.05, at_least=0)
    """Weight decay of AdamW. 1-D parameters and tokens are excluded."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    clip_grad: float | None = option(None, at_least=0)
    """Maximum norm of the gradient (default: no clipping)."""
    drop_path: float = option(0.1, at_least=0, below=1)
    """Stochastic depth rate of the last block; earlier blocks have linearly lower rates."""
    label_smoothing: float = option(0.1, at_least=0, below=1)
    """Label smoothing."""
    mixup: float = option(0.8, at_least=0)
    """Alpha of mixup; 0 disables it."""
    cutmix: float = option(1.0, at_least=0)
    """Alpha of CutMix; 0 disables it."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation, or none."""
    random_erase: float = option(0.25, at_least=0, below=1)
    """Probability of random erasing."""
    crop_scale: tuple[float, float] = option((0.08, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop, as a fraction of the image."""
    flip: bool | Flip = True
    """Flip images at random, with probability 0.5 per axis: horizontal (or true), vertical, both,
    or none (or false). Use both for aerial or microscope images."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; auto is bfloat16 on a GPU and float32 on a
    CPU."""
    checkpoint_every: str = option("5%", duration=True)
    """Interval between checkpoints. Run the same command again to resume from the latest one."""


@dataclass
class StatsConfig(FrozenConfig):
    """Statistics of features without labels: effective rank, similarity of patches."""

    images: int = option(10_000, at_least=1)
    """Number of images to measure on, drawn at random."""


@dataclass
class HardnessConfig(EvalConfig):
    """How well the loss predictor ranks patches by difficulty."""

    images: int = option(256, at_least=1)
    """Number of images to measure on, drawn at random."""


PROTOCOLS: dict[str, type[EvalConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "attentive": AttentiveConfig,
    "finetune": FinetuneConfig,
    "stats": StatsConfig,
    "hardness": HardnessConfig,
}

"""Semantic segmentation: a linear head on frozen features, or UPerNet fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpm.core.errors import UserError
from hpm.core.options import option, refused
from hpm.evals.contract import RANDOM, TRAINED, Measured
from hpm.evals.options import EvalOptions

if TYPE_CHECKING:
    from hpm.evals.task import Task

COLUMNS = {
    "mean IoU": "{mean_iou:.1f}",
    "95 % interval": "{mean_iou_low:.1f} to {mean_iou_high:.1f}",
    "mean accuracy": "{mean_accuracy:.1f}",
    "pixel accuracy": "{pixel_accuracy:.1f}",
}
CLIPS = "segmentation is for images"


@dataclass
class Options(EvalOptions):
    """Semantic segmentation: a linear layer on frozen patch tokens, or UPerNet fine-tuned."""

    data: str = option(may_change=True)
    """Images with masks, whose pixels are numbers of classes: a folder of images/ with masks/
    (also one for each split), ADE20K, Pascal VOC, or demo, the built-in images. Tests on the val or
    test split if there is one, else on a fifth of the images."""
    frames: int | None = refused(EvalOptions, "frames", CLIPS)
    frame_stride: int | None = refused(EvalOptions, "frame_stride", CLIPS)
    crop_share: float = refused(EvalOptions, "crop_share", "segmentation reads whole images")
    head: Literal["linear", "upernet"] = option("linear", main=True)
    """linear: frozen features and one linear layer on the patch tokens, whose learning rate is
    chosen on a held-out fifth of the training images (on 200 of these if there are more). upernet:
    the whole encoder is fine-tuned (BEiT, MAE)."""
    image_size: int | None = option(None, at_least=1, main=True)
    """Side in pixels of crops and windows, and shorter side of the images that are tested (default:
    twice that of pre-training). Positions are interpolated."""
    steps: int | None = option(None, at_least=1, main=True)
    """Optimiser steps (default: 1000 of the linear head, 2000 of UPerNet)."""
    batch_size: int = option(16, at_least=2, main=True)
    """Crops per optimiser step, summed over all processes."""
    baselines: bool | None = option(  # type: ignore[assignment]
        None, may_change=True, testing_only=True
    )
    """Also measure random weights of the same architecture (default: with the linear head alone;
    UPerNet is trained a second time for it)."""
    train_share: float = option(1.0, above=0, at_most=1)
    """Fraction of the training images to use."""
    max_unreadable: float = option(
        0.1, at_least=0, at_most=1, may_change=True, changes_numbers=False
    )
    """Stop if more than this fraction of the images cannot be read."""
    ignored: int | None = option(None, at_least=0, at_most=255)
    """Label in the masks that neither trains nor counts, as 255 never does (default: the class
    called void or unlabeled in classes.txt; 0 in ADE20K)."""
    one_class: bool | None = None
    """The masks number objects: all of them are one class beside the background (default: where
    annotations/instances_*.json has a single category)."""
    stride: int | None = option(None, at_least=1, may_change=True, testing_only=True)
    """Pixels from one window to the next in testing (default: two thirds of image_size)."""
    figure_images: int = option(
        6, at_least=0, may_change=True, changes_numbers=False, testing_only=True
    )
    """Number of test images in the figure."""
    scale: tuple[float, float] = option((0.5, 2.0), above=0, rising=True)
    """Smallest and largest shorter side that training images are resized to before a crop is taken,
    as a multiple of image_size."""
    flip: bool = True
    """Mirror half of the crops."""
    distort: bool = True
    """Change brightness, contrast, saturation and hue at random (images of 1 or 3 channels)."""
    lr: tuple[float, ...] = option((0.1, 0.3, 1.0, 3.0, 10.0, 30.0), above=0, may_change=True)
    """(linear) Learning rates to try."""
    peak_lr: float = option(1e-4, above=0)
    """(upernet) Learning rate of the head after the warm-up."""
    min_lr: float = option(0.0, at_least=0)
    """(upernet) Learning rate at the end of training."""
    warmup: str = option("5%", duration=True)
    """(upernet) Length of the linear warm-up."""
    warmup_lr: float = option(1e-6, at_least=0)
    """(upernet) Learning rate that the warm-up starts from."""
    power: float = option(1.0, above=0)
    """(upernet) Power of the polynomial decay; 1 is linear."""
    weight_decay: float = option(0.05, at_least=0)
    """(upernet) Weight decay of AdamW. 1-D parameters and tokens are excluded."""
    betas: tuple[float, float] = option((0.9, 0.999), at_least=0, below=1)
    """(upernet) Betas of AdamW."""
    layer_decay: float = option(0.65, above=0, at_most=1)
    """(upernet) Factor by which the learning rate shrinks from each layer to the one below it."""
    drop_path: float = option(0.1, at_least=0, below=1)
    """(upernet) Stochastic depth rate of the last block; earlier blocks have linearly lower
    rates."""
    dropout: float = option(0.1, at_least=0, below=1)
    """(upernet) Dropout rate of whole channels before the classifiers."""
    channels: int | None = option(None, at_least=1)
    """(upernet) Channels of the head (default: the encoder's width)."""
    clip_grad: float | None = option(None, at_least=0)
    """(upernet) Maximum norm of the gradient; 0 clips nothing (default: no clipping)."""
    accumulate: int = option(1, at_least=1)
    """(upernet) Number of gradient accumulation steps that each batch is split into. Batch norms
    see one part at a time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder and of UPerNet; auto is bfloat16 on a GPU that has it (NVIDIA's
    since Ampere), else float32."""
    checkpoint_every: str = option(
        "5%", duration=True, above=0, may_change=True, changes_numbers=False
    )
    """(upernet) Interval between checkpoints. Run the same command again to resume from the latest
    one."""

    @property
    def unreadable_limit(self) -> float:
        return self.max_unreadable

    @property
    def with_random_weights(self) -> bool:
        return self.head == "linear" if self.baselines is None else self.baselines


# Options that only one of the heads has.
OF_HEADS = {
    "linear": ("lr",),
    "upernet": (
        *("peak_lr", "min_lr", "warmup", "warmup_lr", "power", "weight_decay", "betas"),
        *("layer_decay", "drop_path", "dropout", "channels", "clip_grad", "accumulate"),
    ),
}


def _check_head(options: Options) -> None:
    """Raise UserError for an option of another head."""
    for head, names in OF_HEADS.items():
        for name in names:
            if head != options.head and getattr(options, name) != getattr(Options, name):
                raise UserError(
                    f"{name} is an option of --head {head}, and head is {options.head}: leave it "
                    "out"
                )


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield a row for each backbone."""
    from hpm.evals.segment.job import SegmentationJob
    from hpm.evals.segment.linear import train_linear_heads
    from hpm.evals.segment.upernet import train_upernet

    task.need_images("segmentation")
    _check_head(options)
    job = SegmentationJob(task, options)
    if options.head == "linear":
        for name, (model, chosen) in train_linear_heads(job).items():
            yield job.measured(name, model, chosen)
        return
    task.about["training"] = job.folder(TRAINED).parent.name
    for each in task.backbones:
        weights = None if each.name == RANDOM else each.backbone.encoder.state_dict()
        model = train_upernet(job, each, weights, job.folder(each.name))
        yield job.measured(each.name, model, {})

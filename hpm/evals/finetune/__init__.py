"""Fine-tuning: the whole encoder trained with labels (the recipe of DeiT and MAE, appendix A.1; for
clips, of VideoMAE)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hpm.core.choices import Flip
from hpm.core.errors import UserError
from hpm.core.options import option
from hpm.evals.contract import COMPARED, RANDOM, RAW_PIXELS, Measured
from hpm.evals.options import ClassificationOptions

if TYPE_CHECKING:
    from hpm.evals.features import Labelled
    from hpm.evals.task import Task


@dataclass
class Options(ClassificationOptions):
    """Fine-tune the whole encoder with labels, by the recipe of DeiT and MAE."""

    baselines: bool = option(False, may_change=True, testing_only=True)
    """Also fine-tune random weights of the same architecture (a second full training), and train a
    linear layer on raw pixels."""
    batch_size: int = option(256, at_least=1, main=True)
    """Images per optimiser step, summed over all processes."""
    repeat_augment: int = option(1, at_least=1)
    """Number of views per image in a batch, each with its own augmentation; a clip is decoded once.
    Each view counts as an image of the batch and of the epoch."""
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
    betas: tuple[float, float] = option((0.9, 0.999), at_least=0, below=1)
    """Betas of AdamW."""
    clip_grad: float | None = option(None, at_least=0)
    """Maximum norm of the gradient; 0 clips nothing (default: no clipping)."""
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
    """Flip images at random, with probability 0.5 per axis: horizontal (the default; also true),
    vertical, both, or none (also false). Use both for aerial or microscope images."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; auto is bfloat16 on a GPU that has it
    (NVIDIA's since Ampere), else float32."""
    checkpoint_every: str = option(
        "5%", duration=True, above=0, may_change=True, changes_numbers=False
    )
    """Interval between checkpoints. Run the same command again to resume from the latest one."""


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield a row for each backbone and, with baselines, for a linear layer on raw pixels."""
    from hpm.core import distributed
    from hpm.evals.files import training_folder
    from hpm.evals.finetune.training import check_finetune, finetune

    reader = task.test_reader
    _check_clips(task)
    if task.folder is None:
        raise UserError(f"{options.run} is no run folder: pass --out FOLDER for the fine-tuning")
    for backbone in task.backbones:
        check_finetune(options, backbone.architecture)
    data = task.labelled(options.train_share)
    if options.baselines:
        task.held_out(data)  # check now that each class has enough images
    test_images = 0
    # As many images at once as in training.
    parts = options.accumulate * distributed.world_size()
    reader = replace(reader, batch_size=max(1, options.batch_size // parts))
    for backbone in task.backbones:
        random = backbone.name == RANDOM
        weights = None if random else backbone.backbone.encoder.state_dict()
        folder = training_folder("finetune", options, task.folder, backbone.name)
        ranks = finetune(options, backbone, weights, data, folder, reader)
        yield Measured(backbone.name, scores=ranks)
        test_images = test_images or len(ranks.labels)
    if options.baselines:
        yield _linear_layer_on_pixels(task, data)
    task.about |= {"train_images": len(data.train), "test_images": test_images}
    task.about |= {"classes": len(data.classes), "training": folder.parent.name}


def _check_clips(task: Task) -> None:
    """Raise UserError for clips and an encoder of images, whose features can only be pooled."""
    for backbone in task.backbones:
        if task.reader.sampling and len(backbone.architecture.image_size) == 2:
            raise UserError(
                f"{task.options.compare if backbone.name == COMPARED else task.options.run} is of "
                "images: to fine-tune on clips, make it a run of clips first (hpm pretrain VIDEOS "
                "--frames 16 --init RUN)"
            )


def _linear_layer_on_pixels(task: Task, data: Labelled) -> Measured:
    """Baseline without a network: a linear probe of raw pixels with default options."""
    from hpm.evals import linear
    from hpm.evals.features import extract, raw_pixels

    view = task.backbones[0].view
    train, test = (
        extract(lambda x: {RAW_PIXELS: raw_pixels(x)}, source, labels, *view, reader)
        for source, labels, reader in task.sides(data)
    )
    defaults = linear.Options(task.options.run, task.options.data, seed=task.options.seed)
    probed = task.probe_cached(data, train, test, linear.recipe(task, defaults))[RAW_PIXELS]
    return probed.measured(f"{RAW_PIXELS} (linear)")

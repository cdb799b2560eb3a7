"""Object detection: Mask R-CNN on the fine-tuned encoder (ViTDet, Li et al. 2022, arXiv
2203.16527)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpm.core.errors import UserError
from hpm.core.options import option, refused
from hpm.evals.contract import RANDOM, Measured
from hpm.evals.options import EvalOptions

if TYPE_CHECKING:
    from hpm.evals.task import Task

COLUMNS = {
    "AP": "{AP:.1f}",
    "95 % interval": "{AP_low:.1f} to {AP_high:.1f}",
    "AP50": "{AP50:.1f}",
    "AP75": "{AP75:.1f}",
    "small": "{AP_small:.1f}",
    "medium": "{AP_medium:.1f}",
    "large": "{AP_large:.1f}",
}
CLIPS = "detection is for images"


@dataclass
class Options(EvalOptions):
    """Fine-tune the encoder as an object detector: Mask R-CNN on ViTDet's feature pyramid."""

    data: str = option(may_change=True)
    """Images with boxes and masks of objects: a folder with COCO's JSON
    (annotations/instances_SPLIT.json, SPLIT/_annotations.coco.json or annotations.json), or demo,
    the built-in images. Tests on the val or test split if there is one, else on a fifth of the
    images. Without masks, boxes alone are learned."""
    frames: int | None = refused(EvalOptions, "frames", CLIPS)
    frame_stride: int | None = refused(EvalOptions, "frame_stride", CLIPS)
    crop_share: float = refused(EvalOptions, "crop_share", "detection reads whole images")
    baselines: bool = option(False, may_change=True, testing_only=True)
    """Also fine-tune random weights of the same architecture (a second full training)."""
    image_size: int | None = option(None, at_least=32, main=True)
    """Side of the training crops in pixels, a multiple of 32 (default: twice that of
    pre-training). Test images are resized to fit into such a square. Positions are
    interpolated."""
    steps: int = option(2000, at_least=1, main=True)
    """Number of optimiser steps."""
    batch_size: int = option(16, at_least=1, main=True)
    """Images per optimiser step, summed over all processes."""
    accumulate: int = option(1, at_least=1)
    """Number of gradient accumulation steps that each batch is split into. Saves memory; the batch
    size stays the same."""
    lr: float = option(1e-4, at_least=0, main=True)
    """Peak learning rate, whatever the batch size."""
    warmup: str = option("5%", duration=True)
    """Length of the linear learning rate warm-up."""
    milestones: tuple[str, ...] = ("89%", "96%")
    """When the learning rate is multiplied by lr_factor: durations from the start of training."""
    lr_factor: float = option(0.1, above=0, at_most=1)
    """Factor of the learning rate at each milestone."""
    layer_decay: float = option(0.7, above=0, at_most=1)
    """Factor by which the learning rate shrinks from each layer to the one below it."""
    weight_decay: float = option(0.1, at_least=0)
    """Weight decay of AdamW. 1-D parameters, tokens and positions are excluded."""
    betas: tuple[float, float] = option((0.9, 0.999), at_least=0, below=1)
    """Betas of AdamW."""
    clip_grad: float | None = option(None, at_least=0)
    """Maximum norm of the gradient; 0 clips nothing (default: no clipping)."""
    drop_path: float = option(0.1, at_least=0, below=1)
    """Stochastic depth rate of the last block; earlier blocks have linearly lower rates."""
    scale: tuple[float, float] = option((0.5, 2.0), above=0, rising=True)
    """Large-scale jitter: smallest and largest size of a training image, relative to the size that
    fits into the crop."""
    flip: bool = True
    """Mirror half of the training images."""
    window_size: int | None = option(None, at_least=1)
    """Side in patches of the windows that attention is limited to, in all blocks but the last of
    each quarter (default: global attention everywhere)."""
    channels: int = option(256, at_least=8)
    """Channels of the feature pyramid and of the heads."""
    anchor_scale: float = option(4.0, above=0)
    """Side of the anchor boxes, in strides of their feature map (4, 8, 16, 32 and 64 pixels)."""
    proposals: int = option(500, at_least=1)
    """Number of boxes per image that the region proposal network passes on."""
    box_batch_size: int = option(128, at_least=1)
    """Number of these boxes per image that the heads are trained on."""
    score_threshold: float = option(0.05, at_least=0, below=1, may_change=True, testing_only=True)
    """Lowest score of a detection."""
    max_test_images: int | None = option(None, at_least=1, may_change=True, testing_only=True)
    """Number of test images, drawn at random (default: all)."""
    figure_images: int = option(
        6, at_least=0, may_change=True, changes_numbers=False, testing_only=True
    )
    """Number of test images to draw with their detections, in a PNG file beside the numbers."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; auto is bfloat16 on a GPU that has it
    (NVIDIA's since Ampere), else float32."""
    max_unreadable: float = option(
        0.1, at_least=0, at_most=1, may_change=True, changes_numbers=False
    )
    """Stop if more than this fraction of the images cannot be read."""
    checkpoint_every: str = option(
        "5%", duration=True, above=0, may_change=True, changes_numbers=False
    )
    """Interval between checkpoints. Run the same command again to resume from the latest one."""

    @property
    def unreadable_limit(self) -> float:
        return self.max_unreadable


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield two rows for each backbone: average precision of boxes and of masks."""
    from functools import partial

    from hpm.evals.detect.data import open_data
    from hpm.evals.detect.figure import save_figure
    from hpm.evals.detect.testing import DetectionScores, check_images, find_objects
    from hpm.evals.detect.training import check_options, fine_tune
    from hpm.evals.files import training_folder

    check_options(options)
    task.need_images("detection")
    if task.folder is None:
        raise UserError(f"{options.run} is no run folder: pass --out FOLDER for the fine-tuning")
    data = open_data(options)
    check_images(data.test, task.trained.architecture.channels, task)
    task.about |= {"train_images": len(data.train), "classes": len(data.classes)}
    for backbone in task.backbones:
        name = backbone.name
        folder = training_folder("detect", options, task.folder, name)
        task.about["training"] = folder.parent.name
        model = fine_tune(options, backbone, name == RANDOM, data, folder)
        found = find_objects(model, data.test, options, task)
        task.about["test_images"] = len(found.truth["images"])
        figures = {}
        if options.figure_images:
            title = f"{name}, {data.test.name}"
            figures[f"{name.replace(' ', '_')}.png"] = partial(
                save_figure,
                model=model,
                source=data.test,
                found=found,
                count=options.figure_images,
                title=title,
            )
        scores = DetectionScores(found, "boxes")
        yield Measured(f"{name}, boxes", scores=scores, figures=figures)
        if data.test_masks:
            yield Measured(f"{name}, masks", scores=DetectionScores(found, "masks"))

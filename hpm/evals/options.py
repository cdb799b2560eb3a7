"""Common options of evaluations, from which each evaluation derives its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.core.choices import DeviceName
from hpm.core.options import LARGEST_SEED, option
from hpm.data.video.sampling import ONE_VIEW, ViewGrid


@dataclass
class EvalOptions:
    """Options of every evaluation."""

    run: str = option(may_change=True)
    """Run folder, checkpoint or weights file (including published HPM, MAE, timm and Hugging Face
    ViT weights), or timm/NAME for timm's pretrained weights."""
    data: str = option(may_change=True)
    """Images, with labels except for hardness and stats (see pretrain). Tests on the val or test
    split if there is one, else on a fifth of the images."""
    test: str | None = option(None, main=True, may_change=True)
    """Test images, if they are not a split of the data: the val or test split of these images if
    there is one, else all."""
    compare: str | None = option(None, main=True, may_change=True)
    """Second run to compare with; reports paired differences and their confidence intervals."""
    teacher: bool = option(False, main=True, may_change=True)
    """Use the teacher's (EMA) weights (run folder or checkpoint only)."""
    frames: int | None = option(None, at_least=1)
    """Frames of the clips to evaluate on (default: as in pre-training). For a run on images, the
    features of the frames are averaged."""
    frame_stride: int | None = option(None, at_least=0)
    """Frames of the video from one frame of a clip to the next (default: as in pre-training). 0
    repeats the middle frame, to evaluate without motion."""
    baselines: bool = option(True, may_change=True, testing_only=True)
    """Also measure random weights of the same architecture, and raw pixels."""
    out: str | None = option(None, path=True, may_change=True, changes_numbers=False)
    """Folder for the results (default: evals/ in the run folder)."""
    crop_share: float = option(1.0, above=0, at_most=1, may_change=True, testing_only=True)
    """Fraction of the shorter side that the centre crop keeps. 1 keeps the largest centred box;
    0.875 resizes to image_size / 0.875 first, as is usual for ImageNet."""
    batch_size: int = option(128, at_least=1, changes_numbers=False)
    """Images per forward pass."""
    workers: int | None = option(None, at_least=0, may_change=True, changes_numbers=False)
    """Number of processes that load images (default: one per spare core, at most 16)."""
    device: DeviceName = option("auto", may_change=True, changes_numbers=False)
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    """Random seed of the random-weights baseline, splits, batches and masks."""

    @property
    def feature_precision(self) -> Literal["float32", "bfloat16"]:
        """Precision of frozen backbones."""
        return "float32"

    @property
    def with_random_weights(self) -> bool:
        """Whether random weights are measured as well."""
        return self.baselines

    @property
    def unreadable_limit(self) -> float:
        """Largest share of the images that may be unreadable."""
        return 1.0

    @property
    def test_grid(self) -> ViewGrid:
        """The views of each test video whose scores are averaged."""
        return ONE_VIEW


@dataclass
class LabelledEvalOptions(EvalOptions):
    """Options of every evaluation with labels."""

    train_share: float = option(1.0, above=0, at_most=1)
    """Fraction of each class's training images to use; 0.01 and 0.1 are the usual few-label
    settings."""
    max_unreadable: float = option(
        0.1, at_least=0, at_most=1, may_change=True, changes_numbers=False
    )
    """Stop if more than this fraction of the images cannot be read."""

    @property
    def unreadable_limit(self) -> float:
        return self.max_unreadable


@dataclass
class ClassificationOptions(LabelledEvalOptions):
    """Options of classification."""

    segments: int = option(1, at_least=1, may_change=True, testing_only=True)
    """Clips per test video, evenly spaced in time, whose scores are averaged."""
    crops: int = option(1, at_least=1, may_change=True, testing_only=True)
    """Crops per test clip, evenly spaced along the longer side, whose scores are averaged. The
    usual tests of clips are 5 segments of 3 crops (Kinetics) and 2 of 3 (Something-Something)."""

    @property
    def test_grid(self) -> ViewGrid:
        return ViewGrid(self.segments, self.crops)


@dataclass
class FrozenEvalOptions(EvalOptions):
    """Options of every evaluation of frozen features."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the backbone; bfloat16 is faster on a GPU. The probes are always trained in
    float32."""

    @property
    def feature_precision(self) -> Literal["float32", "bfloat16"]:
        return self.precision

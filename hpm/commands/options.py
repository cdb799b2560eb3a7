"""Options of the other verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.commands.gpus import GpuName
from hpm.core.choices import DeviceName
from hpm.core.config import PretrainConfig
from hpm.core.options import LARGEST_SEED, option


@dataclass
class ExportConfig:
    """Export the backbone to another library and check that it gives the same outputs there."""

    run: str
    """Run folder, checkpoint or weights file (anything that --init takes), or timm/NAME; or the
    file of a segmenter (to onnx) or of a classifier (to onnx or safetensors, of clips also to hf)
    that hpm eval trained."""
    to: Literal["timm", "hf", "torchvision", "onnx", "safetensors"]
    """Library or format; hf is Hugging Face transformers, safetensors is hpm's own file."""
    out: str = option(path=True)
    """File to write, or folder for hf. Existing files are not overwritten."""
    teacher: bool = False
    """Export the teacher's (EMA) weights (run folder or checkpoint only)."""
    pool: Literal["mean", "cls"] = "mean"
    """Pooled output of timm and onnx: the mean of the patch tokens, or the class token."""
    with_decoder: bool = False
    """For hf: export a ViTMAEForPreTraining, or of clips a VideoMAEForPreTraining, with the
    reconstructor (run folder or checkpoint only)."""
    push: str | None = None
    """Repository USER/NAME on the Hugging Face hub to upload to, with a model card. A new
    repository is private."""
    public: bool = False
    """With --push, make a new repository public."""
    with_figure: bool = False
    """Add the run's latest figure to the model card. It shows some of the run's images."""
    crop_share: float = option(1.0, above=0, at_most=1)
    """For hf: fraction of the shorter side that the centre crop of the preprocessing keeps, as in
    the evaluations."""
    licence: str | None = None
    """Licence of the weights for the model card, for example apache-2.0 or cc-by-nc-4.0."""


@dataclass
class SeedOptions(PretrainConfig):
    """Seeds and labels."""

    seeds: int = option(3, at_least=1, main=True)
    """Number of seeds, counted from --seed."""
    labels: str | None = option(None, main=True)
    """Labelled images for kNN and the linear probe (default: the training data, if it has
    labels)."""


@dataclass
class MethodsConfig(SeedOptions):
    """Test whether mining helps on your images: compare MAE, the predictor's loss with random
    masks, HPM and HPM by memory at equal time, over several seeds. Takes all options of pretrain;
    --epochs and --steps are those of HPM, --max-hours is the time of each run."""


@dataclass
class AblateConfig(SeedOptions):
    """Pre-train variants over several seeds and compare them. Takes all options of pretrain."""

    arm: tuple[str, ...] = option((), main=True)
    """Set of options to compare: mae, predictor, hpm, hpm_memory, or your own as `NAME: mask=random
    predictor_loss=none`. Differences are reported relative to the first arm."""
    vary: tuple[str, ...] = option((), main=True)
    """Option and its values, for example `mask=random,easy_to_hard`. All combinations are run, with
    every arm."""


@dataclass
class PlanConfig:
    """Examine the images and the machine, and suggest a command for pre-training."""

    data: str
    """Images or videos (see pretrain)."""
    hours: float | None = option(None, above=0, main=True)
    """Hours available for the training (default: as many as a full training takes, at most 24)."""
    gpu: GpuName | None = option(None, main=True)
    """Plan for this GPU instead of this machine. Time and memory are then estimates."""
    out: str | None = option(None, path=True, main=True)
    """Run folder of the suggested command (default: runs/ and the name of the data)."""
    frames: int | None = option(None, at_least=1)
    """Number of frames per clip (default: 16 for videos, 1 for images)."""
    look_at: int = option(1000, at_least=1)
    """Number of images to decode, evenly spaced; twenty times as many are searched for
    duplicates."""
    device: DeviceName = "auto"
    """Device of this machine to plan for; auto uses the GPU if there is one."""
    json: str | None = option(None, path=True, main=True)
    """JSON file to write the plan to."""


@dataclass
class BenchConfig(PretrainConfig):
    """Time the training steps of MAE and HPM in turns, on noise, phase by phase. Takes all options
    of pretrain; options of mining and of the predictor apply to HPM only."""

    data: str = "demo"
    """Ignored: the images are noise."""
    out: str = ""
    """Ignored: nothing is written."""
    batch_size: int | None = option(64, at_least=1, main=True)
    """Images per optimiser step."""
    repeats: int = option(5, at_least=1, main=True)
    """Number of rounds; each times MAE, HPM and a matrix product."""
    steps_each: int = option(3, at_least=1, main=True)
    """Number of steps of each method per round."""
    json: str | None = option(None, path=True, main=True)
    """JSON file to write the results to."""


@dataclass
class BenchDenseConfig:
    """Options that the benchmarks of segmentation and detection share."""

    model: str = option("vit_base", main=True)
    """Encoder (see pretrain), with random weights."""
    image_size: int = option(512, at_least=1, main=True)
    """Side of the square images in pixels."""
    patch_size: int | None = option(None, at_least=1)
    """Patch size in pixels (default: the model's)."""
    input_channels: int = option(3, at_least=1, at_most=32)
    """Number of image channels."""
    batch_size: int = option(2, at_least=1, main=True)
    """Images per step."""
    classes: int = option(150, at_least=1)
    """Number of classes."""
    repeats: int = option(5, at_least=1, main=True)
    """Number of rounds; each times training, testing and a matrix product."""
    steps_each: int = option(3, at_least=1, main=True)
    """Number of steps of training and of testing per round."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; auto is bfloat16 on a GPU that has it
    (NVIDIA's since Ampere), else float32."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    """Random seed of the weights and of the images."""
    json: str | None = option(None, path=True, main=True)
    """JSON file to write the results to."""


@dataclass
class BenchSegmentConfig(BenchDenseConfig):
    """Time the steps of UPerNet, training and testing, on noise (see `hpm eval segment`)."""

    batch_size: int = option(2, at_least=2, main=True)
    """Images per step."""
    channels: int | None = option(None, at_least=1)
    """Channels of the head (default: the encoder's width)."""


@dataclass
class BenchDetectConfig(BenchDenseConfig):
    """Time the steps of Mask R-CNN, training and testing, on noise (see `hpm eval detect`). In
    testing, masks are predicted for 100 objects per image, the most that there can be."""

    image_size: int = option(1024, at_least=1, main=True)
    """Side of the square images in pixels."""
    classes: int = option(80, at_least=1)
    """Number of classes."""
    window_size: int | None = option(None, at_least=1, main=True)
    """Side in patches of the windows that attention is limited to (default: global attention)."""
    channels: int = option(256, at_least=8)
    """Channels of the feature pyramid and of the heads."""
    proposals: int = option(1000, at_least=1)
    """Number of boxes per image that the region proposal network passes on."""
    box_batch_size: int = option(512, at_least=1)
    """Number of these boxes per image that the heads are trained on."""
    objects: int = option(7, at_least=1)
    """Objects in a training image; COCO has 7 on average."""


@dataclass
class BenchDataConfig:
    """Measure how fast images load with 1, 2, ... workers, compare with the bare libraries, and
    name the bottleneck."""

    data: str
    """Images (see pretrain); the training split is used."""
    image_size: int | tuple[int, int] = option(224, at_least=1)
    """Image size in pixels: one number, or height,width."""
    frames: int = option(1, at_least=1)
    """Number of frames per clip of a video, as in pretrain; 1 for images. Clips are then counted as
    images."""
    frame_stride: int = option(4, at_least=1)
    """Number of the video's frames from one frame of a clip to the next."""
    channels: int = option(3, at_least=1, at_most=32)
    """Number of image channels, as in pretrain."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop, as a fraction of the image."""
    batch_size: int = option(64, at_least=1)
    """Images per batch of a worker."""
    workers: int | None = option(None, at_least=1)
    """Largest number of workers to try (default: number of cores)."""
    images_per_second: float | None = None
    """Images per second that a training needs; reports the number of workers for it."""
    images: int = option(1024, at_least=1)
    """Number of images per measurement."""
    repeats: int = option(3, at_least=1)
    """Number of rounds; each times the bare libraries and every number of workers."""
    json: str | None = option(None, path=True)
    """JSON file to write the results to."""


@dataclass
class TokenizeConfig:
    """Learn a codebook of discrete tokens for `--target tokens`."""

    data: str
    """Images (see pretrain); the training split is used."""
    out: str = option("codebook.safetensors", path=True)
    """File to write."""
    of: str = "pixels"
    """What to cluster: pixels of patches, or the features of a frozen model (timm/NAME, hf/NAME or
    a folder)."""
    codes: int = option(512, at_least=2)
    """Number of tokens."""
    image_size: int | tuple[int, int] = option(224, at_least=1)
    """Image size in pixels, as in pretrain."""
    patch_size: int | tuple[int, int] = option(16, at_least=1)
    """Patch size in pixels, as in pretrain."""
    channels: int = option(3, at_least=1, at_most=32)
    """Number of image channels, as in pretrain."""
    images: int = option(10_000, at_least=1)
    """Number of images to learn from, drawn at random."""
    patches: int = option(200_000, at_least=1)
    """Number of patches to learn from, drawn at random."""
    rounds: int = option(100, at_least=1)
    """Maximum number of k-means iterations."""
    workers: int = option(0, at_least=0)
    """Number of processes that load images."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    """Random seed of the sampling and of the initial codes."""


@dataclass
class PrepareOptions:
    """Options."""

    data: str
    """Images (see pretrain), with their splits and labels."""
    out: str = option(path=True)
    """Folder to write; pass it as DATA to other commands. Run the same command again to resume."""
    size: int = option(512, at_least=1, main=True)
    """Length in pixels that the shorter side of larger images is reduced to. With 512, a crop of a
    fifth of the area still has 224 pixels; 256 is smaller and faster."""
    quality: int = option(90, at_least=1, at_most=100, main=True)
    """JPEG quality of reduced images; other images are copied unchanged."""
    channels: int = option(3, at_least=1, at_most=32)
    """Number of image channels, as in pretrain."""
    workers: int | None = option(None, at_least=0)
    """Number of processes (default: one per spare core, at most 16)."""


@dataclass
class PrepareConfig(PrepareOptions):
    """Shrink images once and write them into large files that are fast to read."""


@dataclass
class DemoConfig:
    """Pre-train, evaluate and draw on the built-in images or videos. Takes minutes on a CPU."""

    video: bool = False
    """Videos, whose classes are motions, instead of images."""
    out: str | None = option(None, path=True)
    """Run folder (default: runs/demo, or runs/demo-video)."""
    steps: int | None = option(None, at_least=1)
    """Number of optimiser steps (default: as in the preset demo or demo_video)."""
    seed: int | None = option(None, at_least=0, at_most=LARGEST_SEED)
    """Random seed of the training (default: 0)."""


@dataclass
class DoctorConfig:
    """Show versions, hardware, decoders and extras: what is missing, and how to get it."""

    json: str | None = option(None, path=True)
    """JSON file to write the findings to."""


@dataclass
class CompletionConfig:
    """Print a script that completes verbs, options and their values when you press the tab key.
    bash: `eval "$(hpm completion bash)"` in ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after
    compinit. fish: `hpm completion fish | source` in ~/.config/fish/config.fish."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell."""


@dataclass
class PredictConfig:
    """Write the predictions of a fine-tuned model for a folder of images or videos: masks as PNG,
    objects as COCO's JSON, or classes as CSV."""

    model: str
    """Fine-tuned model: its file, or a folder that holds one, such as a run folder."""
    images: str
    """Folder of images, searched recursively, or one image; videos for a classifier of clips."""
    out: str = option(path=True)
    """Folder to write. A segmenter writes PNG masks with a palette, named as the images, and
    classes.txt; a detector results.json (or the .json file that you name); a classifier
    predictions.csv (or the .csv file that you name). Existing files are not overwritten."""
    segments: int = option(1, at_least=1)
    """Clips per video, evenly spaced in time, whose probabilities a classifier averages."""
    crops: int = option(1, at_least=1)
    """Crops per clip, evenly spaced along the longer side, whose probabilities are averaged."""
    frame_stride: int | None = option(None, at_least=1)
    """Frames of the video from one frame of a clip to the next (default: as in fine-tuning)."""
    crop_share: float = option(1.0, above=0, at_most=1)
    """For a classifier: fraction of the shorter side that the centre crop keeps (see eval)."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1)
    """Stop if more than this fraction of the images cannot be read."""
    workers: int | None = option(None, at_least=0)
    """Number of processes that load images (default: one per spare core, at most 16)."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""

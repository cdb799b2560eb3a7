"""Options of embed and similar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpm.core.choices import DeviceName
from hpm.core.options import option


@dataclass
class EmbedOptions:
    """Options."""

    run: str
    """Run folder, checkpoint or weights file (anything that --init takes), or timm/NAME."""
    images: str
    """Images (see pretrain), those of all splits; videos for a run that was trained on clips."""
    out: str | None = option("features.parquet", path=True, main=True)
    """What to write: a .parquet, .npy or .safetensors file, or a folder of parquet files (a name
    without a suffix), which is the choice for millions of images."""
    pool: Literal["mean", "cls"] = option("mean", main=True)
    """Pooled features: the mean of the patch tokens, or the class token."""
    patches: bool = option(False, main=True)
    """Also write the features of every patch."""
    dtype: Literal["float16", "float32"] = option("float32", main=True)
    """Type of the numbers in the file."""
    teacher: bool = False
    """Use the teacher's (EMA) weights (run folder or checkpoint only)."""
    image_size: int | tuple[int, int] | None = None
    """Image size in pixels, one number or height,width (default: that of the training)."""
    crop_share: float = option(1.0, above=0, at_most=1)
    """Fraction of the shorter side that the centre crop keeps, as in the evaluations."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder; bfloat16 is faster on a GPU."""
    max_unreadable: float = option(0.1, at_least=0, at_most=1)
    """Stop if more than this fraction of the images cannot be read."""
    shard_images: int | None = option(None, at_least=1)
    """Images that are computed and saved at a time (default: 10,000 in a folder, otherwise 1,000;
    fewer with --patches)."""
    batch_size: int = option(128, at_least=1)
    """Images per forward pass."""
    workers: int | None = option(None, at_least=0)
    """Number of processes that load images (default: one per spare core, at most 16)."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""


@dataclass
class EmbedConfig(EmbedOptions):
    """Write the features of images into a file: one row per image. An interrupted command goes on
    when it is run again."""


@dataclass
class SimilarConfig:
    """List the images whose features are most similar to those of an image, or all pairs of
    near-duplicates."""

    features: str
    """What hpm embed wrote."""
    image: str | None = option(None, main=True)
    """Image to compare with the others; it need not be one of them."""
    count: int = option(10, at_least=1, main=True)
    """Number of images, or of pairs with --duplicates, to list."""
    duplicates: float | None = option(None, above=0, at_most=1, main=True)
    """Find all pairs of images whose features have at least this cosine similarity."""
    out: str | None = option(None, path=True, main=True)
    """CSV file for the list; with --duplicates it holds all pairs, not only the first."""
    centre: bool = True
    """Subtract the mean of all features first. Without it, features of masked modelling are similar
    for any two images."""
    run: str | None = None
    """Where the weights are now, if they are no longer where hpm embed found them. Needed for
    timm/NAME, because names in files are not downloaded."""
    approximate: bool = False
    """Search an index (HNSW) instead of comparing with every image. It is built at the first call
    and kept beside the features; worth it for many searches among millions of images (pip install
    'hpm-vision[faiss]')."""
    device: DeviceName = "auto"
    """Device to compute on; auto uses a CUDA GPU if there is one.
    mps, Apple's, is untested."""

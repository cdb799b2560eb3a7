"""Discrete tokens of patches: a codebook learned by k-means (`hpm tokenize`), the nearest code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpm import distributed
from hpm.checkpoint import read_tensors, write_tensors
from hpm.checks import MOST_CHANNELS
from hpm.config import TokenizeConfig, pair
from hpm.data.loader import evaluation_batches
from hpm.data.sources import Source, Subset, open_source
from hpm.distributed import pick_device
from hpm.errors import UserError
from hpm.frozen import FrozenModel, load_frozen
from hpm.logs import track
from hpm.models.patches import patchify

Vectors = Float[Tensor, "batch patches dim"]
ROWS_AT_A_TIME = 8192
STILL = 1e-4  # relative gain of a round of k-means below which it has converged


@dataclass
class Codebook:
    """Codes [K D], and of what: `pixels` of patches of a size, or features of a frozen model."""

    codes: Float[Tensor, "codes dim"]
    of: str
    patch_size: tuple[int, int]
    channels: int
    frozen: FrozenModel | None = None

    def to(self, device: torch.device) -> Codebook:
        self.codes = self.codes.to(device)
        if self.frozen is not None:
            self.frozen.to(device)
        return self

    def vectors(
        self, pixels: Float[Tensor, "batch channels height width"], grid: tuple[int, ...]
    ) -> Vectors:
        """What is compared with the codes, of images with values in [0, 1]."""
        if self.frozen is not None:
            features = self.frozen(pixels, (grid[0], grid[1]))
            return torch.nn.functional.normalize(features, dim=-1)
        # Without its mean: a code is a shape and a contrast, not a brightness.
        patches = patchify(pixels, self.patch_size)
        return patches - patches.mean(-1, keepdim=True)

    def nearest(self, vectors: Vectors) -> Int[Tensor, "batch patches"]:
        """The number of the nearest code of each patch."""
        return nearest_code(vectors.flatten(0, 1), self.codes)[0].view(vectors.shape[:2])

    def save(self, path: Path) -> None:
        about = {"kind": "hpm codebook", "of": self.of, "channels": self.channels}
        write_tensors(path, {"codes": self.codes}, about | {"patch_size": list(self.patch_size)})


def load_codebook(path: str) -> Codebook:
    """Raises UserError where the file is none, or names a model that is not on disk."""
    tensors, about = read_tensors(Path(path).expanduser())
    if about.get("kind") != "hpm codebook":
        raise UserError(f"{path} is no codebook: make one by hpm tokenize DATA --out {path}")
    frozen = load_frozen(about["of"], fetch=False) if about["of"] != "pixels" else None
    height, width = about["patch_size"]
    return Codebook(tensors["codes"], about["of"], (height, width), about["channels"], frozen)


def tokenize(config: TokenizeConfig) -> tuple[Path, float]:
    """Learn a codebook from the patches of some images. Returns its file and the mean squared
    distance of a patch to its code; raises UserError on bad input."""
    out = Path(config.out)
    for name in ("codes", "images", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    size, patch = pair(config.image_size), pair(config.patch_size)
    if any(p < 1 or s % p for s, p in zip(size, patch, strict=True)):
        raise UserError(f"patch_size {config.patch_size} does not divide {config.image_size}")
    if out.suffix != ".safetensors":
        raise UserError(f"out is '{out}': name a .safetensors file")
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    if not 1 <= config.channels <= MOST_CHANNELS:
        raise UserError(f"channels is {config.channels}; it must lie between 1 and {MOST_CHANNELS}")
    if config.of != "pixels" and config.channels not in (1, 3):
        raise UserError(
            f"of {config.of} takes grey or RGB images, but channels is {config.channels}: pass "
            "--of pixels"
        )
    if distributed.world_size() > 1:
        raise UserError("tokenize runs in one process: leave torchrun out")
    device = pick_device(config.device)
    frozen = load_frozen(config.of) if config.of != "pixels" else None
    codebook = Codebook(torch.empty(0, 1), config.of, patch, config.channels, frozen).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    vectors = _sample(codebook, open_source(config.data).train, size, config, generator)
    if len(vectors) < config.codes:
        raise UserError(
            f"codes {config.codes} is more than there are patches ({len(vectors)}): pass fewer "
            "--codes or more images"
        )
    codebook.codes, inertia = kmeans(vectors.to(device), config.codes, config.rounds, generator)
    codebook.save(out)
    return out, inertia / len(vectors)


def _sample(
    codebook: Codebook, source: Source, size: tuple[int, int], config: TokenizeConfig,
    generator: torch.Generator,
) -> Float[Tensor, "vectors dim"]:  # fmt: skip
    """Patches of random images; of each image as many as PATCHES allows."""
    chosen = torch.randperm(len(source), generator=generator)[: config.images].sort().values
    grid = tuple(s // p for s, p in zip(size, codebook.patch_size, strict=True))
    share = max(1, min(math.prod(grid), config.patches // len(chosen)))
    found = []
    some = Subset(source, chosen.numpy())
    batches = math.ceil(len(chosen) / 64)
    reading = evaluation_batches(some, size, config.channels, 64, config.workers)
    for batch in track(reading, "patches", batches):
        if len(batch.images):
            pixels = batch.images.to(codebook.codes.device).float() / 255
            vectors = codebook.vectors(pixels, grid).cpu()
            kept = torch.rand(vectors.shape[:2], generator=generator).argsort(1)[:, :share]
            found.append(vectors.gather(1, kept[..., None].expand(-1, -1, vectors.shape[-1])))
    if not found:
        raise UserError(f"{source.name}: no readable image")
    return torch.cat(found).flatten(0, 1)


def kmeans(
    vectors: Float[Tensor, "vectors dim"], k: int, rounds: int, generator: torch.Generator
) -> tuple[Float[Tensor, "codes dim"], float]:
    """Lloyd's algorithm from a k-means++ start: (codes, inertia).

    The inertia is the sum of squared distances to the nearest code. A code that loses all of its
    vectors moves to the one that is furthest from any code.
    """
    codes = _spread_start(vectors, k, generator)
    before = math.inf
    for _ in track(range(rounds), "k-means"):
        nearest, distances = nearest_code(vectors, codes)
        inertia = distances.double().sum().item()
        if inertia > before * (1 - STILL):
            break
        before = inertia
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=k)
        codes = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        codes[empty] = vectors[distances.topk(len(empty)).indices]
    return codes, nearest_code(vectors, codes)[1].double().sum().item()


def _spread_start(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each code is drawn with a chance in proportion to
    the squared distance to those before."""
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    codes = [vectors[first]]
    distances = (vectors - codes[0]).square().sum(1)
    for _ in range(k - 1):
        reach = distances.double().cumsum(0)
        place = float(torch.rand(1, generator=generator)) * reach[-1]
        codes.append(vectors[torch.searchsorted(reach, place).clamp(max=len(vectors) - 1)])
        distances = torch.minimum(distances, (vectors - codes[-1]).square().sum(1))
    return torch.stack(codes)


def nearest_code(
    vectors: Float[Tensor, "vectors dim"], codes: Float[Tensor, "codes dim"]
) -> tuple[Int[Tensor, " vectors"], Float[Tensor, " vectors"]]:
    """(number of the nearest code, squared distance to it) of each vector."""
    ids, distances = [], []
    lengths = codes.square().sum(1)
    for part in vectors.split(ROWS_AT_A_TIME):
        squared = lengths - 2 * part @ codes.T
        least, nearest = squared.min(1)
        ids.append(nearest)
        distances.append((least + part.square().sum(1)).clamp(min=0))
    return torch.cat(ids), torch.cat(distances)

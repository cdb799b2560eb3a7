"""Codebooks for discrete patch tokens, learned by k-means (`hpm tokenize`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpm.core.errors import UserError
from hpm.core.files import read_tensors, write_tensors
from hpm.core.precision import to_float64
from hpm.core.progress import track
from hpm.models.patches import patchify
from hpm.targets.frozen_model import FrozenModel, load_frozen

Vectors = Float[Tensor, "batch patches dim"]

CHUNK_SIZE = 8192  # rows per distance computation

CONVERGED = 1e-4  # k-means stops below this relative decrease of the inertia


@dataclass
class Codebook:
    """Codes [K D] of `pixels` of patches, or of features of a frozen model (`of`)."""

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
        """The vectors to compare with the codes, for images with values in [0, 1]."""
        if self.frozen is not None:
            features = self.frozen(pixels, (grid[0], grid[1]))
            return torch.nn.functional.normalize(features, dim=-1)
        # Subtract the mean, so that codes represent structure rather than brightness.
        patches = patchify(pixels, self.patch_size)
        return patches - patches.mean(-1, keepdim=True)

    def nearest(self, vectors: Vectors) -> Int[Tensor, "batch patches"]:
        """The index of the nearest code of each patch."""
        return nearest_code(vectors.flatten(0, 1), self.codes)[0].view(vectors.shape[:2])

    def save(self, path: Path) -> None:
        about = {"kind": "hpm codebook", "of": self.of, "channels": self.channels}
        write_tensors(path, {"codes": self.codes}, about | {"patch_size": list(self.patch_size)})


def load_codebook(path: str) -> Codebook:
    """Load a codebook. Raises UserError if the file is not one, or names a model that is not on
    disk."""
    tensors, about = read_tensors(Path(path).expanduser())
    if about.get("kind") != "hpm codebook":
        raise UserError(f"{path} is no codebook: make one by hpm tokenize DATA --out {path}")
    frozen = load_frozen(about["of"], fetch=False) if about["of"] != "pixels" else None
    height, width = about["patch_size"]
    return Codebook(tensors["codes"], about["of"], (height, width), about["channels"], frozen)


def kmeans(
    vectors: Float[Tensor, "vectors dim"], k: int, rounds: int, generator: torch.Generator
) -> tuple[Float[Tensor, "codes dim"], float]:
    """Lloyd's algorithm with k-means++ initialisation: (codes, inertia).

    The inertia is the sum of squared distances to the nearest code. A code without vectors moves to
    the vector that is furthest from its nearest code.
    """
    codes = _kmeans_plus_plus(vectors, k, generator)
    before = math.inf
    for _ in track(range(rounds), "k-means"):
        nearest, distances = nearest_code(vectors, codes)
        inertia = to_float64(distances).sum().item()
        if inertia > before * (1 - CONVERGED):
            break
        before = inertia
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=k)
        codes = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        codes[empty] = vectors[distances.topk(len(empty)).indices]
    return codes, to_float64(nearest_code(vectors, codes)[1]).sum().item()


def _kmeans_plus_plus(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each code is drawn with a probability proportional
    to the squared distance to the nearest earlier code."""
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    codes = [vectors[first]]
    distances = (vectors - codes[0]).square().sum(1)
    for _ in range(k - 1):
        cumulative = to_float64(distances).cumsum(0)
        drawn = float(torch.rand(1, generator=generator)) * cumulative[-1]
        codes.append(vectors[torch.searchsorted(cumulative, drawn).clamp(max=len(vectors) - 1)])
        distances = torch.minimum(distances, (vectors - codes[-1]).square().sum(1))
    return torch.stack(codes)


def nearest_code(
    vectors: Float[Tensor, "vectors dim"], codes: Float[Tensor, "codes dim"]
) -> tuple[Int[Tensor, " vectors"], Float[Tensor, " vectors"]]:
    """(index of the nearest code, squared distance to it) of each vector."""
    ids, distances = [], []
    lengths = codes.square().sum(1)
    for part in vectors.split(CHUNK_SIZE):
        squared = lengths - 2 * part @ codes.T
        least, nearest = squared.min(1)
        ids.append(nearest)
        distances.append((least + part.square().sum(1)).clamp(min=0))
    return torch.cat(ids), torch.cat(distances)

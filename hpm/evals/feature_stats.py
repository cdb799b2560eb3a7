"""Statistics of features without labels: effective rank, and similarity of patches."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hpm.core import distributed
from hpm.data.sources import Source
from hpm.evals.contract import RAW_PIXELS
from hpm.evals.features import (
    CLASS_TOKEN,
    PATCH_MEAN,
    Embed,
    EvaluatedBackbone,
    Features,
    ImageReader,
    by_view,
    extract,
    raw_patches,
    raw_pixels,
)

LIKENESS = "patch likeness of "


def feature_stats(
    backbones: list[EvaluatedBackbone], source: Source, reader: ImageReader, baseline: bool
) -> tuple[dict[str, dict[str, float]], int]:
    """For each kind of features: `rank` (effective rank), `of` (its maximum) and, if made of
    patches, `patch_similarity` (mean cosine similarity of two patches of an image); and the number
    of images that could be read."""
    values: dict[str, dict[str, float]] = {}
    images = 0
    for alike, with_pixels in by_view(backbones, baseline):
        embed = _embed(alike, with_pixels)
        found = extract(embed, source, np.zeros(len(source), int), *alike[0].view, reader)
        measured, images = distributed.main_first(partial(_measured, found))
        values |= measured
    return values, images


def _measured(found: dict[str, Features]) -> tuple[dict[str, dict[str, float]], int]:
    values = {}
    for name, features in found.items():
        if not name.startswith(LIKENESS):
            x = features.features
            values[name] = {"rank": effective_rank(x), "of": float(min(x.shape))}
    for name, features in found.items():
        if name.startswith(LIKENESS):
            likeness = features.features.mean().item()
            values[name.removeprefix(LIKENESS)]["patch_similarity"] = likeness
    return values, len(next(iter(found.values())).labels)


def _embed(backbones: list[EvaluatedBackbone], baseline: bool) -> Embed:
    @torch.inference_mode()
    def embed(images: Tensor) -> dict[str, Tensor]:
        features = {}
        for backbone in backbones:
            cls_token, patches = backbone.parts(images)
            mean = backbone.title(images, PATCH_MEAN)
            if cls_token is not None:
                features[backbone.title(images, CLASS_TOKEN)] = cls_token
            features[mean] = patches.mean(1)
            features[LIKENESS + mean] = patch_similarity(patches)
        if baseline:
            patches = raw_patches(images, backbones[0].architecture.patch_size)
            features[RAW_PIXELS] = raw_pixels(images)
            features[LIKENESS + RAW_PIXELS] = patch_similarity(patches)
        return features

    return embed


def effective_rank(features: Float[Tensor, "images dim"]) -> float:
    """RankMe (Garrido et al. 2023, equation 1): exp of the entropy of the normalised singular
    values.

    Between 1 (all features are collinear) and min(images, dim) (all singular values are equal).
    """
    x = features.double()
    # The eigenvalues of the smaller Gram matrix are the squares of all non-zero singular values.
    product = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()


def patch_similarity(patches: Float[Tensor, "batch patches dim"]) -> Float[Tensor, " batch"]:
    """Mean cosine similarity of two different patches of an image; 1 means collapse."""
    count = patches.shape[1]
    unit = F.normalize(patches.float(), dim=-1)
    # The sum over all pairs is the square of the sum; subtract pairs of a patch with itself.
    return (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (count * (count - 1))

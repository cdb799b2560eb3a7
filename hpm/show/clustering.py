"""Clusters and a map of features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, Int

from hpm.core.extras import need
from hpm.evals.similarity import BLOCK, Bank

MANY = 20_000  # rows beyond which k-means works on batches
MOST_BY_DEFAULT = 20
JOB = "a page of clusters"

Features = Float[np.ndarray, "images dim"]


@dataclass(frozen=True)
class Clusters:
    """Clusters in order of size, the largest first.

    numbers: the cluster of each image. closeness: cosine similarity of each image to the centre of
    its cluster.
    """

    count: int
    numbers: Int[np.ndarray, " images"]
    closeness: Float[np.ndarray, " images"]

    def members(self, number: int) -> Int[np.ndarray, " members"]:
        """Rows of a cluster, those nearest to its centre first."""
        rows = np.flatnonzero(self.numbers == number)
        return rows[np.argsort(-self.closeness[rows], kind="stable")]


def centred_units(features: Features) -> Float[np.ndarray, "images dim"]:
    """Features centred and scaled to unit length, in float32, as `hpm similar` compares them."""
    bank = Bank(features, centred=True)
    return torch.cat([bank.block(start) for start in bank.starts]).numpy()


def default_count(images: int) -> int:
    """Number of clusters for this many images."""
    return int(np.clip(round((images / 2) ** 0.5), 1, MOST_BY_DEFAULT))


def find_clusters(features: Features, count: int, seed: int) -> Clusters:
    """k-means of features of unit length."""
    cluster = need("sklearn.cluster", "clusters", JOB)
    count = min(count, len(features))
    kind = cluster.MiniBatchKMeans if len(features) > MANY else cluster.KMeans
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct images than clusters
        found = kind(count, random_state=seed, n_init=4).fit(features)
    sizes = np.bincount(found.labels_, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    rank = np.zeros(count, np.int64)
    rank[order] = np.arange(len(order))
    centres = unit(found.cluster_centers_)
    closeness = np.empty(len(features), np.float32)
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        closeness[rows] = (features[rows] * centres[found.labels_[rows]]).sum(1)
    return Clusters(len(order), rank[found.labels_], closeness)


def unit(rows: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
    """Rows scaled to unit length."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def agreement(numbers: Int[np.ndarray, " images"], labels: np.ndarray) -> float:
    """Adjusted mutual information of clusters and labels: 0 by chance, 1 if they are the same.
    Images whose label is "" are left out."""
    metrics = need("sklearn.metrics", "clusters", JOB)
    known = labels != ""
    return float(metrics.adjusted_mutual_info_score(labels[known], numbers[known]))


def project(features: Features, seed: int) -> tuple[Float[np.ndarray, "images 2"], str]:
    """Positions in the unit square, and how they were found: by UMAP where it is installed, else
    PCA."""
    if find_spec("umap") and len(features) > 15:  # the neighbours that UMAP looks at
        umap = need("umap", "umap", "the map")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a seed makes it run in one thread, and it says so
            places = umap.UMAP(metric="cosine", random_state=seed).fit_transform(features)
        how = "UMAP: neighbours stay neighbours; distances across the map mean little"
    else:
        centred = features - features.mean(0)
        _, strengths, axes = np.linalg.svd(centred, full_matrices=False)
        places = np.zeros((len(features), 2), np.float32)
        found = centred @ axes[:2].T
        places[:, : found.shape[1]] = found
        share = (strengths[:2] ** 2).sum() / max(float((strengths**2).sum()), 1e-12)
        how = f"PCA: the first two components, {100 * share:.0f} % of the variance"
    low, high = places.min(0), places.max(0)
    return ((places - low) / np.maximum(high - low, 1e-12)).astype(np.float32), how

"""Cosine similarities of features: nearest images and near-duplicates.

Both work block by block, so that beside the features they need little memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.core.errors import UserError
from hpm.core.extras import need
from hpm.core.progress import track

BLOCK = 4096  # rows; a block of similarities is 64 MB
ROUNDING = 1e-6  # equal features differ by so much
LINKS = 32  # of each image in an HNSW index

Features = Float[np.ndarray, "images dim"]


class Bank:
    """Features as rows of unit length in float32, made block by block.

    centred: subtract the mean of all rows first. Features of masked modelling have a large common
    part: without this, the cosine similarity of any two images may be above 0.9.
    """

    def __init__(self, features: Features, centred: bool) -> None:
        self.features = features
        self.mean = np.zeros(features.shape[1])
        if centred:
            total = sum(
                features[start : start + BLOCK].sum(0, dtype=np.float64) for start in self.starts
            )
            self.mean = total / len(features)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def starts(self) -> range:
        """The first row of each block."""
        return range(0, len(self.features), BLOCK)

    def block(self, start: int) -> Float[Tensor, "rows dim"]:
        """The rows of a block."""
        return self.units(self.features[start : start + BLOCK])

    def units(self, rows: Float[np.ndarray, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Other features, treated as those of the bank."""
        # Equal rows of float16 stay equal in float64.
        centred = torch.from_numpy(rows.astype(np.float64) - self.mean)
        return F.normalize(centred, dim=1).float()


def nearest(
    bank: Bank, query: Float[np.ndarray, " dim"], count: int
) -> tuple[Int[np.ndarray, " found"], Float[np.ndarray, " found"]]:
    """Rows of highest cosine similarity to the query, and these similarities, highest first."""
    wanted = bank.units(query[None])[0]
    similarities = torch.cat([bank.block(start) @ wanted for start in bank.starts])
    found = similarities.topk(min(count, len(similarities)))
    return found.indices.numpy(), found.values.numpy()


def similar_pairs(
    bank: Bank, threshold: float, device: torch.device
) -> Iterator[tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], np.ndarray]]:
    """Yield all pairs of rows whose cosine similarity is at least the threshold: (first rows,
    second rows, similarities), with first < second."""
    starts = list(bank.starts)
    blocks = [(a, b) for a in starts for b in starts if b >= a]
    row = -1
    left = torch.empty(0)
    for first, second in track(blocks, "comparing", total=len(blocks)):
        if first != row:
            row, left = first, bank.block(first).to(device)
        right = left if second == first else bank.block(second).to(device)
        similarities = left @ right.T
        if second == first:
            similarities = similarities.triu(1)
        rows, columns = (similarities >= threshold - ROUNDING).nonzero(as_tuple=True)
        values = similarities[rows, columns].clamp(max=1)
        if second == first:
            above = rows < columns  # zeros below the diagonal count where the threshold is tiny
            rows, columns, values = rows[above], columns[above], values[above]
        if len(rows):
            yield tuple(x.cpu().numpy() for x in (rows + first, columns + second, values))  # type: ignore[misc]


@dataclass
class MostSimilar:
    """Keeps the pairs of highest similarity."""

    count: int
    _heap: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, first: np.ndarray, second: np.ndarray, similarities: np.ndarray) -> None:
        best = np.argsort(-similarities, kind="stable")[: self.count]
        for at in best.tolist():
            pair = (float(similarities[at]), -int(first[at]), -int(second[at]))
            if len(self._heap) < self.count:
                heapq.heappush(self._heap, pair)
            else:
                heapq.heappushpop(self._heap, pair)

    @property
    def pairs(self) -> list[tuple[int, int, float]]:
        """(first row, second row, similarity), highest first."""
        return [(-a, -b, value) for value, a, b in sorted(self._heap, reverse=True)]


def open_index(file: Path, made_of: Path, bank: Bank) -> Any:
    """faiss's HNSW index of the features: read from the file if it is newer than them, else built
    and written there."""
    faiss = need("faiss", "faiss", "--approximate")
    newest = max(p.stat().st_mtime for p in (made_of, *made_of.glob("part-*")))
    if file.exists() and file.stat().st_mtime >= newest:
        try:
            index = faiss.read_index(str(file))
        except RuntimeError:
            raise UserError(f"{file} is damaged: remove it") from None
        if index.ntotal == len(bank):
            return index
    index = faiss.IndexHNSWFlat(len(bank.mean), LINKS, faiss.METRIC_INNER_PRODUCT)
    for start in track(bank.starts, "building the index", total=len(bank.starts)):
        index.add(bank.block(start).numpy())
    faiss.write_index(index, str(file))
    return index


def nearest_in_index(
    index: Any, bank: Bank, query: Float[np.ndarray, " dim"], count: int
) -> tuple[Int[np.ndarray, " found"], Float[np.ndarray, " found"]]:
    """As `nearest`, but by the index, which may miss some rows."""
    wanted = bank.units(query[None]).numpy()
    index.hnsw.efSearch = max(64, 4 * count)
    similarities, rows = index.search(wanted, min(count, index.ntotal))
    found = rows[0] >= 0
    return rows[0][found], similarities[0][found]

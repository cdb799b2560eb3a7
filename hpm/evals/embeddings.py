"""Features of images, with the paths and labels of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped


@dataclass
class Embeddings:
    """Features of images: row i of every array belongs to the same image.

    paths: of the images, as text.
    ids: position of each image in the data that was embedded.
    features: pooled features, one row per image.
    labels: class names as text, "" where an image has none; None for data without labels.
    splits: `train` or `test`; None for data without a test split.
    patches: features of the patches, if they were asked for.
    about: how the features were made: weights, pooling, preprocessing, data.
    """

    paths: Sequence[str]
    ids: Int[np.ndarray, " images"]
    features: Float[np.ndarray, "images dim"]
    labels: Shaped[np.ndarray, " images"] | None = None
    splits: Shaped[np.ndarray, " images"] | None = None
    patches: Float[np.ndarray, "images patches dim"] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        patches = "" if self.patches is None else f", patches {list(self.patches.shape)}"
        return (
            f"Embeddings({len(self):,} images, features {list(self.features.shape)} "
            f"{self.features.dtype}{patches}, of {self.about.get('run')} on "
            f"{self.about.get('data')})"
        )

    @staticmethod
    def load(path: str | Path, patches: bool = False) -> Embeddings:
        """Read what `hpm embed` wrote, with the features of patches only if asked for.

        Raises UserError if the path holds no features.
        """
        from hpm.evals.embedding_files import format_of

        path = Path(path).expanduser()
        return format_of(path).read(path, patches)

    @staticmethod
    def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
        """The rows of all parts, in order."""
        first = parts[0]

        def joined(name: str) -> Any:
            if getattr(first, name) is None:
                return None
            return np.concatenate([getattr(part, name) for part in parts])

        return Embeddings(
            [path for part in parts for path in part.paths],
            ids=joined("ids"),
            features=joined("features"),
            labels=joined("labels"),
            splits=joined("splits"),
            patches=joined("patches"),
            about=first.about,
        )

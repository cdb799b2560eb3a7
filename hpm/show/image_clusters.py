"""Clusters of images from Python: `hpm.cluster(features)`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from hpm.core.errors import counted
from hpm.data.chain import Chain
from hpm.evals.embeddings import Embeddings
from hpm.show.clustering import Clusters, centred_units, default_count, find_clusters, project
from hpm.show.clusters import LABELS_NAMED, SIDE, kind_of, open_images, thumbnails
from hpm.show.drawing import Drawing, new_figure

THUMB = 0.75  # inches
GAP = 4  # pixels between thumbnails
MAP = 5.0  # inches


def cluster(
    features: Embeddings,
    clusters: int | None = None,
    data: str | Path | None = None,
    seed: int = 0,
) -> ImageClusters:
    """Group images by their features (k-means on centred features of unit length).

    Args:
        features: of `hpm.embed`.
        clusters: how many. Default: by the number of images, at most 20.
        data: the images, if they have moved since they were embedded.

    Raises UserError if the images are not there, or scikit-learn is not installed
    (`pip install 'hpm-vision[clusters]'`).
    """
    source = open_images(features.about, None if data is None else str(data))
    units = centred_units(features.features)
    found = find_clusters(units, clusters or default_count(len(units)), seed)
    return ImageClusters(features, found, source, units, seed)


@dataclass(frozen=True)
class ImageClusters:
    """Clusters of images, the largest first. A notebook shows the images nearest to each centre."""

    features: Embeddings
    clusters: Clusters
    source: Chain
    units: np.ndarray
    seed: int

    def __len__(self) -> int:
        return self.clusters.count

    @property
    def numbers(self) -> Int[np.ndarray, " images"]:
        """The cluster of each row of the features, from 0."""
        return self.clusters.numbers

    def members(self, number: int) -> list[str]:
        """Paths of a cluster's images, those nearest to its centre first."""
        return [self.features.paths[row] for row in self.clusters.members(number).tolist()]

    def show(self, images: int = 8) -> Drawing:
        """A row of images for each cluster, those nearest to its centre, with its size and its most
        frequent labels."""
        rows = [self.clusters.members(number)[:images] for number in range(len(self))]
        ids = self.features.ids[np.concatenate(rows)]
        pictures = thumbnails(self.source, ids, self.features.about["channels"])
        figure = new_figure(THUMB * images, (THUMB + 0.22) * len(self), dpi=SIDE / THUMB)
        axes = figure.subplots(len(self), squeeze=False)[:, 0]
        ends = np.cumsum([len(row) for row in rows])
        for number, (axis, own) in enumerate(zip(axes, np.split(pictures, ends[:-1]), strict=True)):
            line = np.full((SIDE, images * (SIDE + GAP), 3), 255, np.uint8)
            for place, picture in enumerate(own):
                line[:, place * (SIDE + GAP) :][:, :SIDE] = picture
            axis.imshow(line)
            axis.set_axis_off()
            axis.set_title(self._about(number), fontsize=8, loc="left")
        return Drawing(figure)

    def map(self) -> Drawing:
        """All images as points, coloured by cluster; similar images lie together."""
        from matplotlib import colormaps

        places, how = project(self.units, self.seed)
        figure = new_figure(MAP, MAP, dpi=100)
        axis = figure.subplots()
        colours = colormaps["tab20"]
        for number in range(len(self)):
            x, y = places[self.numbers == number].T
            axis.scatter(x, y, s=12, color=colours(number % 20), label=str(number + 1))
        axis.set_axis_off()
        figure.legend(title="cluster", fontsize=7, frameon=False, loc="outside right center")
        axis.set_title(how.partition(":")[0] + f" of {len(places):,} {self._kind}s", fontsize=9)
        return Drawing(figure)

    @property
    def _kind(self) -> str:
        return kind_of(self.features)

    def _about(self, number: int) -> str:
        members = self.clusters.members(number)
        about = f"{number + 1}: {counted(len(members), self._kind)}"
        if self.features.labels is None:
            return about
        common = Counter(self.features.labels[members].tolist()).most_common(LABELS_NAMED)
        shares = (f"{name or 'no label'} {100 * n / len(members):.0f} %" for name, n in common)
        return f"{about}; {', '.join(shares)}"

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(self.clusters.members(n))) for n in range(len(self)))
        return f"ImageClusters({len(self)} clusters of {sizes} {self._kind}s)"

    def _repr_png_(self) -> bytes:
        return self.show()._repr_png_()

"""Extract the features of a data set, each image exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.core import distributed
from hpm.core.errors import UserError, counted
from hpm.data.loader import Batch, evaluation_batches
from hpm.data.sources import Source, Splits, Subset
from hpm.data.unreadable import UnreadableImages
from hpm.data.video.sampling import ONE_VIEW, ClipSampling, ViewGrid
from hpm.data.workers import num_workers
from hpm.evals.classes import by_class
from hpm.evals.contract import OVER_FRAMES, RAW_PIXELS
from hpm.models.architecture import Architecture
from hpm.models.patches import patchify
from hpm.weights.resolve import Backbone

Embed = Callable[[Tensor], dict[str, Tensor]]
CLASS_TOKEN, PATCH_MEAN = ", class token", ", patch mean"  # kinds of features


@dataclass
class Features:
    """Features and labels of the same images, in the same order.

    views: of each image. With several, each image has as many consecutive rows of features.
    """

    features: Float[Tensor, rows * dims]
    labels: Int[Tensor, " images"]
    views: int = 1

    def rows(self, ids: Tensor) -> Tensor:
        """Features of all views of these images."""
        if self.views == 1:
            return self.features[ids]
        return self.features.unflatten(0, (-1, self.views))[ids].flatten(0, 1)


@dataclass
class EvaluatedBackbone:
    """A backbone to evaluate, and its name in the results."""

    name: str
    backbone: Backbone
    architecture: Architecture
    precision: Literal["float32", "bfloat16"] = "float32"

    def parts(
        self, images: Tensor
    ) -> tuple[Float[Tensor, "batch dim"] | None, Float[Tensor, "batch patches dim"]]:
        """Class token (or None) and patches of a loaded batch, in float32. The features of an
        encoder of images are averaged over the frames of a clip."""
        device, clips = self.backbone.mean.device.type, self.pools_frames(images)
        frames = images.transpose(1, 2).flatten(0, 1) if clips else images
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            cls_token, patches = self.backbone.tokens(self.backbone.normalize(frames))
        if clips:
            patches = patches.unflatten(0, (len(images), -1)).mean(1)
            if cls_token is not None:
                cls_token = cls_token.unflatten(0, (len(images), -1)).mean(1)
        return None if cls_token is None else cls_token.float(), patches.float()

    def pools_frames(self, images: Tensor) -> bool:
        """Whether these are clips, and the encoder is of images."""
        return images.ndim - 2 > len(self.architecture.image_size)

    def title(self, images: Tensor, kind: str = "") -> str:
        """The name of a kind of features of these images."""
        pooled = OVER_FRAMES if self.pools_frames(images) else ""
        return f"{self.name}{kind}{pooled}"

    @property
    def view(self) -> tuple[tuple[int, int], int]:
        """((height, width) of the images or frames, channels)."""
        height, width = self.architecture.image_size[-2:]
        return (height, width), self.architecture.channels


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of an evaluation, or with `sampling`, the middle clip of each video, or the
    views of a grid."""

    batch_size: int
    workers: int | None
    report: Callable[[str], None]
    crop_share: float = 1.0  # see transforms.evaluation_view
    max_unreadable: float = 1.0
    sampling: ClipSampling | None = None
    grid: ViewGrid = ONE_VIEW

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The size of an image or clip along each axis, given its (height, width)."""
        return size if self.sampling is None else (self.sampling.frames, *size)

    def batches(self, source: Source, size: tuple[int, int], channels: int) -> Any:
        """This process's share of the readable images, in order, in batches.

        With several views of each image, `images` holds all of them, and `indices` each image once.
        An image of which one view cannot be read is left out.
        """
        ids = distributed.part_of(len(source)).numpy()
        workers = num_workers(self.workers)
        own = Subset(source, ids)
        unreadable = UnreadableImages(source, self.max_unreadable)
        for batch in evaluation_batches(
            own,
            size,
            channels,
            self.batch_size,
            workers,
            self.crop_share,
            self.sampling,
            grid=self.grid,
        ):
            unreadable.add((int(ids[index]), problem) for index, problem in batch.unreadable)
            images, indices = batch.complete(self.grid.count)
            if len(indices):
                yield Batch(images, torch.from_numpy(ids)[indices], [])
        unreadable.check(self.report)


def pooled(backbones: list[EvaluatedBackbone], baseline: bool) -> Embed:
    """Features for `extract`: class token (if any) and patch mean of each backbone, and (as a
    baseline) raw pixels. The backbones must have the same view."""

    @torch.inference_mode()
    def embed(images: Tensor) -> dict[str, Tensor]:
        features = {}
        for backbone in backbones:
            cls_token, patches = backbone.parts(images)
            if cls_token is not None:
                features[backbone.title(images, CLASS_TOKEN)] = cls_token
            features[backbone.title(images, PATCH_MEAN)] = patches.mean(1)
        return features | ({RAW_PIXELS: raw_pixels(images)} if baseline else {})

    return embed


def patches(backbones: list[EvaluatedBackbone], baseline: bool) -> Embed:
    """Features for `extract`: patches of each backbone, and (as a baseline) their raw pixels."""

    @torch.inference_mode()
    def embed(images: Tensor) -> dict[str, Tensor]:
        features = {each.title(images): each.parts(images)[1] for each in backbones}
        if baseline:
            features[RAW_PIXELS] = raw_patches(images, backbones[0].architecture.patch_size)
        return features

    return embed


def by_view(
    backbones: list[EvaluatedBackbone], baseline: bool
) -> list[tuple[list[EvaluatedBackbone], bool]]:
    """Group backbones by view. Raw pixels (the baseline) are computed with the first group."""
    groups: list[tuple[list[EvaluatedBackbone], bool]] = []
    for view in dict.fromkeys(backbone.view for backbone in backbones):
        alike = [backbone for backbone in backbones if backbone.view == view]
        groups.append((alike, baseline and not groups))
    return groups


def pooled_features(
    backbones: list[EvaluatedBackbone],
    source: Source,
    labels: np.ndarray,
    reader: ImageReader,
    baseline: bool,
) -> dict[str, Features]:
    """Pooled features of all backbones, and raw pixels, for all readable images (see `extract`)."""
    found: dict[str, Features] = {}
    for alike, with_pixels in by_view(backbones, baseline):
        found |= extract(pooled(alike, with_pixels), source, labels, *alike[0].view, reader)
    first = backbones[0].view
    if any(s.view != first for s in backbones) and RAW_PIXELS in found:
        found[RAW_PIXELS] = found.pop(RAW_PIXELS)  # to the end of the table
    return found


def check_finite(found: dict[str, Features]) -> None:
    """Raise UserError if features are NaN or infinite."""
    for name, features in found.items():
        if not features.features.isfinite().all():
            raise UserError(
                f"the features ({name}) are not finite: the run has diverged; "
                "evaluate an earlier checkpoint, or pre-train with a lower --base-lr"
            )


def extract(
    embed: Embed,
    source: Source,
    labels: np.ndarray,
    size: tuple[int, int],
    channels: int,
    reader: ImageReader,
) -> dict[str, Features]:
    """Features and labels of all readable images, for each kind that `embed` returns.

    Unreadable images are reported and dropped, with their labels. Processes share the images; only
    the main process returns the result, the others an empty dictionary. Raises UserError if no
    image can be read, or if features are not finite.
    """
    share, views = len(distributed.part_of(len(source))), reader.grid.count
    found: dict[str, Tensor] = {}
    ids = torch.empty(share, dtype=torch.int64)
    count = 0
    for batch in reader.batches(source, size, channels):
        rows = slice(count, count + len(batch.indices))
        ids[rows], count = batch.indices, rows.stop
        for name, features in embed(batch.images).items():
            features = features.unflatten(0, (-1, views))
            if name not in found:
                found[name] = torch.empty(share, *features.shape[1:])
            found[name][rows] = features
    ids = ids[:count]
    all_ids = distributed.rows_of_all(ids).sort().values
    if not len(all_ids):
        raise UserError(f"{source.name}: no readable image")
    if not found:  # only other processes have read images
        empty = no_features(embed, reader.shape(size), channels)
        found = {name: each.unflatten(0, (-1, views)) for name, each in empty.items()}
    kept = torch.from_numpy(np.asarray(labels, dtype=np.int64))[all_ids]
    result = {}
    for name in list(found):
        rows_of_name = distributed.rows_to_main(found.pop(name)[:count], ids)
        if distributed.is_main():
            result[name] = Features(rows_of_name.flatten(0, 1), kept, views)
    distributed.main_first(lambda: check_finite(result))
    return result


def no_features(embed: Embed, size: tuple[int, ...], channels: int) -> dict[str, Tensor]:
    """Empty features [0 *], for a process that has read no image."""
    empty = embed(torch.zeros(1, channels, *size, dtype=torch.uint8))
    return {name: features[:0].float().cpu() for name, features in empty.items()}


def raw_pixels(images: Tensor) -> Tensor:
    """Baseline without a network: the pixels of an image, or of all frames of a clip, shrunk to
    about 32 x 32."""
    *frames, height, width = images.shape[2:]
    scale = min(1.0, 32 / min(height, width))
    size = (*frames, round(height * scale), round(width * scale))
    small = F.interpolate(images.float(), size, mode="area")
    return small.flatten(1) - small.flatten(1).mean(1, keepdim=True)


def raw_patches(images: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """Baseline without a network: the pixels of each patch; of a clip with patches of images, their
    mean over time."""
    pixels = images.float() / 255
    if images.ndim - 2 > len(patch_size):
        pixels = pixels.mean(2)
    return patchify(pixels, patch_size)


@dataclass
class Labelled:
    """Training and test sources with the same numbering of classes."""

    train: Source
    train_labels: np.ndarray
    test: Source
    test_labels: np.ndarray
    classes: list[str]


def labelled_splits(splits: Splits, seed: int, train_share: float = 1.0) -> Labelled:
    """Check and align the labels of two splits. Without a test split, a fifth of each class is held
    out.

    train_share: fraction of the training images of each class to keep (at least one image).
    """
    train, test = splits.train, splits.test
    if train.labels is None:
        raise UserError(
            f"{train.name}: the images have no labels; give a folder with one folder per class, "
            "a list file with labels, or parquet with a label column"
        )
    if test is None:
        rest, held = hold_out_by_class(train, seed)
        train, test = Subset(train, rest), Subset(train, held)
    if test.labels is None:
        raise UserError(f"{test.name}: the images have no labels")
    assert train.labels is not None
    unknown = sorted(
        {test.classes[i] for i in np.unique(test.labels)}
        - {train.classes[i] for i in np.unique(train.labels)}
    )
    if unknown:
        raise UserError(
            f"{test.name} has {counted(len(unknown), 'class', 'classes')} that "
            f"{train.name} has not, the first '{unknown[0]}': nothing can be learned of them"
        )
    untested = sorted(set(train.classes) - set(test.classes))
    if untested:
        raise UserError(
            f"{train.name} has {counted(len(untested), 'class', 'classes')} that "
            f"{test.name} has not, the first '{untested[0]}': give both splits the same classes"
        )
    numbers = {name: i for i, name in enumerate(train.classes)}
    # A list of classes may hold some of which there are no images, in either split.
    renumber = np.array([numbers.get(name, -1) for name in test.classes])
    labelled = Labelled(train, train.labels, test, renumber[test.labels], train.classes)
    return labelled if train_share == 1 else _fewer_labels(labelled, train_share, seed)


def _fewer_labels(data: Labelled, share: float, seed: int) -> Labelled:
    rng = np.random.default_rng([seed, len(data.train), 1])
    kept = []
    for _, ids in by_class(data.train_labels):
        kept.append(rng.permutation(ids)[: max(1, round(share * len(ids)))])
    ids = np.sort(np.concatenate(kept))
    return replace(data, train=Subset(data.train, ids), train_labels=data.train_labels[ids])


def hold_out_by_class(source: Source, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (the rest, a fifth of each class). Raises UserError for a class of one image."""
    assert source.labels is not None
    return split_by_class(source.labels, source.classes, source.name, seed)


def split_by_class(
    labels: np.ndarray, classes: list[str], name: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (the rest, a fifth of each class). Raises UserError for a class of one image."""
    rng = np.random.default_rng([seed, len(labels)])
    held = []
    for label, ids in by_class(labels):
        if len(ids) < 2:
            raise UserError(
                f"{name}: class '{classes[label]}' has one image only, and a part of each class "
                "has to be held out: add images of it, or leave the class out"
            )
        held.append(rng.permutation(ids)[: max(1, len(ids) // 5)])
    test = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test), test

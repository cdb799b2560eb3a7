"""Compute the features of images with one encoder, each image once and in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hpm.core.errors import UserError
from hpm.data.loader import Batch, evaluation_batches
from hpm.data.sources import Source
from hpm.evals.features import EvaluatedBackbone
from hpm.training.folder import weights_fingerprint
from hpm.weights.resolve import load

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """What determines the features of an image, apart from the weights."""

    pool: Literal["mean", "cls"] = "mean"
    teacher: bool = False
    image_size: tuple[int, int] | None = None  # None: that of the encoder
    crop_share: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    dtype: Literal["float16", "float32"] = "float32"
    with_patches: bool = False


@dataclass(frozen=True)
class Computed:
    """The features of one batch.

    positions: of the readable images, in the source. arrays: `features` and perhaps `patches`; none
    if no image of the batch is readable. stop: all images before this position are done.
    """

    positions: np.ndarray
    arrays: Arrays
    unreadable: list[tuple[int, str]]
    stop: int


class Embedder:
    """An encoder that turns images into features.

    Raises UserError if the weights cannot be loaded, or do not fit the recipe.
    """

    def __init__(self, run: str, recipe: Recipe, device: torch.device) -> None:
        trained = load(run)
        self.run, self.recipe, self.device = run, recipe, device
        self.notes, self.step = trained.notes, trained.step
        backbone = trained.backbone(teacher=recipe.teacher, image_size=recipe.image_size)
        self.encoder = backbone.encoder
        if recipe.pool == "cls" and not self.encoder.has_class_token:
            raise UserError(f"{run} has no class token: pass --pool mean")
        self.weights = weights_fingerprint(self.encoder, trained.mean, trained.std)
        self.sampling = trained.sampling()
        self._backbone = EvaluatedBackbone(
            "trained", backbone.to(device).eval(), trained.architecture, recipe.precision
        )
        empty = self._compute(torch.zeros(1, *self._shape, dtype=torch.uint8))
        self.shapes = {name: list(values.shape[1:]) for name, values in empty.items()}

    @property
    def about(self) -> dict[str, Any]:
        """The weights and the recipe, as plain values. `features` and `patches` are the shapes of
        one row."""
        recipe = asdict(self.recipe)
        del recipe["with_patches"]
        return {
            "run": self.run,
            "step": self.step,
            "weights": self.weights,
            **recipe,
            "channels": self.encoder.channels,
            "image_size": list(self.encoder.image_size),
            "patch_size": list(self.encoder.patch_size),
            "clip": [self.sampling.frames, self.sampling.stride] if self.sampling else None,
            "features": self.shapes["features"],
            "patches": self.shapes.get("patches"),
        }

    def batches(self, source: Source, batch_size: int, workers: int = 0) -> Iterator[Computed]:
        """The features of all readable images of a source, in order.

        The copy of features from a GPU overlaps with the computation of the next batch.
        """
        on_gpu = self.device.type == "cuda"
        height, width = self.encoder.image_size[-2:]
        batches = evaluation_batches(
            source,
            (height, width),
            self.encoder.channels,
            batch_size,
            workers,
            self.recipe.crop_share,
            self.sampling,
            pin_memory=on_gpu,
        )
        waiting: tuple[Batch, dict[str, Tensor], Any, int] | None = None
        stop = 0
        for batch in batches:
            stop = min(stop + batch_size, len(source))
            tensors = self._compute(batch.images) if len(batch.images) else {}
            copied = torch.cuda.current_stream(self.device).record_event() if on_gpu else None
            if waiting:
                yield self._computed(*waiting)
            waiting = batch, tensors, copied, stop
        if waiting:
            yield self._computed(*waiting)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.encoder.channels, *self.encoder.image_size)

    @torch.inference_mode()
    def _compute(self, images: Tensor) -> dict[str, Tensor]:
        """Features on the CPU; from a GPU, the copies may not have arrived yet."""
        cls_token, patches = self._backbone.parts(images.to(self.device, non_blocking=True))
        pooled = patches.mean(1) if self.recipe.pool == "mean" else cls_token
        assert pooled is not None
        found = {"features": pooled} | ({"patches": patches} if self.recipe.with_patches else {})
        dtype = getattr(torch, self.recipe.dtype)
        overlaps = self.device.type == "cuda"  # elsewhere, nothing waits for the copies
        return {name: x.to(dtype).to("cpu", non_blocking=overlaps) for name, x in found.items()}

    def _computed(
        self, batch: Batch, tensors: dict[str, Tensor], copied: Any, stop: int
    ) -> Computed:
        if copied is not None:
            copied.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        for values in arrays.values():
            if not np.isfinite(values).all():
                self._explain(values)
        return Computed(batch.indices.numpy(), arrays, batch.unreadable, stop)

    def _explain(self, values: np.ndarray) -> None:
        """Raise UserError for values that are not finite."""
        if self.recipe.dtype == "float16" and not np.isnan(values).any():
            raise UserError("the features exceed the range of float16: pass --dtype float32")
        raise UserError(
            f"the features of {self.run} are not finite: the run has diverged; use an earlier "
            "checkpoint"
        )

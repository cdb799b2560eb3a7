"""What a target is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels *size"]

Patches = Float[Tensor, "batch patches values"]

PatchLoss = Float[Tensor, "batch hidden"]

Ids = Int[Tensor, "batch hidden"]

EPS = 1e-6


@runtime_checkable
class Target(Protocol):
    """What the training step needs of a target.

    dim: values per patch that the reconstructor predicts. needs_teacher: whether the teacher's
    features of the whole image, [B 1+N D], are passed in.
    """

    dim: int
    needs_teacher: bool

    def __call__(self, images: Tensor, features: Tensor | None) -> Tensor:
        """Normalised images -> target of every patch, [B N P]."""
        ...

    def patch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[B M P] each -> [B M]."""
        ...

    def ranked_by(self, patch_loss: Tensor, images: Tensor, hidden_ids: Tensor) -> Tensor:
        """The losses [B M] whose order the predictor learns."""
        ...


class _RankedByLoss:
    """The predictor ranks by the patch loss itself."""

    needs_teacher = False

    def ranked_by(self, patch_loss: PatchLoss, images: Images, hidden_ids: Ids) -> PatchLoss:
        return patch_loss

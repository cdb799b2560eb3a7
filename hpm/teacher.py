"""The teacher: an exponential moving average of the student, outside of the autograd graph."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from hpm.models.mim import MaskedImageModel


class Teacher:
    """EMA copy of a whole model: encoder, reconstructor and predictor."""

    def __init__(self, student: MaskedImageModel):
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch patches"]]:
        """Features [B P+N D] and predicted loss [B N] of whole images, nothing hidden."""
        return self.model.predict_loss(images)

    @torch.no_grad()
    def update(self, student: MaskedImageModel, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student, in one fused pass."""
        torch._foreach_lerp_(
            list(self.model.parameters()), list(student.parameters()), weight=1 - decay
        )

"""The teacher: an exponential moving average of the student, outside of the autograd graph."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from hpm.masking import rotating_masks
from hpm.models.mim import MaskedImageModel


class Teacher:
    """EMA copy of a whole model: encoder, reconstructor and predictor."""

    def __init__(self, student: MaskedImageModel):
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: MaskedImageModel, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student, in one fused pass."""
        torch._foreach_lerp_(
            list(self.model.parameters()), list(student.parameters()), weight=1 - decay
        )


Images = Float[Tensor, "batch channels *size"]
Signal = Float[Tensor, "batch patches"]


@torch.no_grad()
def predicted_losses(
    model: MaskedImageModel, images: Images
) -> tuple[Float[Tensor, "batch tokens dim"], Signal]:
    """Features and predicted losses of whole images, nothing hidden (HPM, section 3.3)."""
    features, predicted_loss = model.predict_loss(images)
    return features, predicted_loss.float()


@torch.no_grad()
def predicted_losses_masked(
    model: MaskedImageModel, images: Images, priority: Signal, num_hidden: int
) -> Signal:
    """Predicted loss of each patch from images in which it is hidden, as in training: as many
    masks as hide each patch at least once (two at a mask ratio from 0.5), the mean of each."""
    total, count = torch.zeros_like(priority), torch.zeros_like(priority)
    for visible_ids, hidden_ids in rotating_masks(priority, num_hidden):
        predicted_loss = model.predict_loss(images, visible_ids, hidden_ids)[1].float()
        total.scatter_add_(1, hidden_ids, predicted_loss)
        count.scatter_add_(1, hidden_ids, torch.ones_like(predicted_loss))
    return total / count


@torch.no_grad()
def attention(
    model: MaskedImageModel, images: Images
) -> tuple[Float[Tensor, "batch tokens dim"], Signal]:
    """Features, and the attention of the class token to each patch, mean over heads (AttMask)."""
    features, by_head = model.encoder.with_attention(images)
    return features, by_head.mean(1)

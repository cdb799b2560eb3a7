"""The teacher: an exponential moving average of the student, outside of the autograd graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.shards import local
from hpm.mining.masking import rotating_masks
from hpm.models.mim import MaskedImageModel
from hpm.models.patches import interpolate_positions

Images = Float[Tensor, "batch channels *size"]
Signal = Float[Tensor, "batch patches"]
# `MaskedImageModel.predict_loss` of the teacher, possibly compiled.
PredictLoss = Callable[..., tuple[Tensor, Tensor]]


Model = TypeVar("Model", bound=nn.Module)


class Teacher(Generic[Model]):
    """EMA copy of a whole model: encoder, reconstructor and predictor.

    The copy, `model`, is in evaluation mode and without gradients. Its buffers stay as they were
    copied.

    Args:
        student: any module, on the device where it is trained.
    """

    model: Model

    def __init__(self, student: Model):
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: Model, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student, in one fused pass; of shards, if both
        are sharded.

        Args:
            student: of the same parameters as the one given first.
            decay: from 0 (the student) to 1 (no change).
        """
        torch._foreach_lerp_(
            [local(p) for p in self.model.parameters()],
            [local(p) for p in student.parameters()],
            weight=1 - decay,
        )


GRID_POSITIONS = ("encoder.pos_embed", "decoder_pos_embed")


class SmallTeacher:
    """The teacher applied to smaller images, with interpolated position embeddings.

    Its predictions are interpolated back to the full grid. The cost is roughly proportional to the
    number of patches.

    Args:
        teacher: model whose weights are shared.
        small: model of the same architecture for smaller images, which is modified.
    """

    def __init__(self, teacher: MaskedImageModel, small: MaskedImageModel):
        self.teacher, self.model = teacher, small.requires_grad_(False).eval()
        weights = teacher.state_dict(keep_vars=True)
        shared = {name: w for name, w in weights.items() if name not in GRID_POSITIONS}
        small.load_state_dict(shared, strict=False, assign=True)
        positions = interpolate_positions(
            teacher.decoder_pos_embed, teacher.encoder.grid, small.encoder.grid
        )
        small.decoder_pos_embed.copy_(positions)

    @torch.no_grad()
    def predicted_losses(self, images: Images, predict_loss: PredictLoss | None = None) -> Signal:
        """Predicted loss of each patch of full-size images.

        predict_loss: compiled `predict_loss` of the small model.
        """
        small, encoder = self.model, self.teacher.encoder
        if encoder.pos_embed is not None:  # may be learned: interpolate it again
            weights: dict[str, Tensor] = {"pos_embed": encoder.pos_embed}
            fitted = small.encoder.fit_positions(weights, encoder.grid)["pos_embed"]
            assert small.encoder.pos_embed is not None
            small.encoder.pos_embed.copy_(fitted)
        shrunk = F.interpolate(images, small.encoder.image_size, mode="area")
        predicted_loss = (predict_loss or small.predict_loss)(shrunk)[1].float()
        coarse = predicted_loss.view(-1, 1, *small.encoder.grid)
        # Only rows and columns were shrunk.
        coarse = coarse.flatten(0, -3)[:, None]
        fine = F.interpolate(coarse, encoder.grid[-2:], mode="bilinear")
        return fine.reshape(len(images), -1)


def small_image_size(
    image_size: tuple[int, ...], patch_size: tuple[int, ...], scale: float
) -> tuple[int, ...]:
    """Size in pixels of an image scaled by `scale`, rounded to whole patches; a clip keeps its
    frames."""
    sides = (
        max(1, round(scale * size / patch)) * patch
        for size, patch in zip(image_size[-2:], patch_size[-2:], strict=True)
    )
    return (*image_size[:-2], *sides)


@torch.no_grad()
def predicted_losses(
    predict_loss: PredictLoss, images: Images
) -> tuple[Float[Tensor, "batch tokens dim"], Signal]:
    """Features and predicted losses of full images (HPM, section 3.3)."""
    features, predicted_loss = predict_loss(images)
    return features, predicted_loss.float()


@torch.no_grad()
def predicted_losses_masked(
    predict_loss: PredictLoss, images: Images, priority: Signal, num_hidden: int
) -> Signal:
    """Predicted loss of each patch while it is hidden, as in training. Uses as many masks as are
    needed to hide each patch once (two at a mask ratio of 0.5 or more), and averages."""
    total, count = torch.zeros_like(priority), torch.zeros_like(priority)
    for visible_ids, hidden_ids in rotating_masks(priority, num_hidden):
        predicted_loss = predict_loss(images, visible_ids, hidden_ids)[1].float()
        total.scatter_add_(1, hidden_ids, predicted_loss)
        count.scatter_add_(1, hidden_ids, torch.ones_like(predicted_loss))
    return total / count


@torch.no_grad()
def attention(
    model: MaskedImageModel, images: Images
) -> tuple[Float[Tensor, "batch tokens dim"], Signal]:
    """Features, and the class token's attention to each patch, mean over heads (AttMask)."""
    features, by_head = model.encoder.with_attention(images)
    return features, by_head.mean(1)

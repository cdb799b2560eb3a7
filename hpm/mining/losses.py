"""Patch losses and the loss of the loss predictor. All in float32, under autocast too."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "absolute_loss",
    "normalized_squared_error",
    "ranking_accuracy",
    "relative_loss",
    "squared_error",
    "token_cross_entropy",
]

PatchLoss = Float[Tensor, "batch hidden"]
Values = Float[Tensor, "batch hidden values"]
Scalar = Float[Tensor, ""]


def squared_error(prediction: Values, target: Values) -> PatchLoss:
    """Mean squared error of each patch (pixel targets; HPM, equation 1)."""
    return (prediction.float() - target.float()).square().mean(-1)


def normalized_squared_error(prediction: Values, target: Values) -> PatchLoss:
    """Squared distance of L2-normalised vectors, 2 - 2 cos (feature targets)."""
    prediction = F.normalize(prediction.float(), dim=-1)
    target = F.normalize(target.float(), dim=-1)
    return (prediction - target).square().sum(-1)


def token_cross_entropy(
    logits: Float[Tensor, "batch hidden codes"], tokens: Int[Tensor, "batch hidden"]
) -> PatchLoss:
    """Cross-entropy of each patch's discrete token (BEiT, equation 2)."""
    return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")


def relative_loss(predicted_loss: PatchLoss, patch_loss: PatchLoss) -> tuple[Scalar, Scalar]:
    """Pairwise ranking loss of the predictor: (sum over pairs, number of pairs).

    Over all ordered pairs (i, j) of one image's hidden patches with L_i != L_j: binary
    cross-entropy between sigmoid(l_i - l_j) and [L_i > L_j] (HPM, equations 4 to 6). The pair
    (j, i) has the same value as (i, j), so it is softplus(-(l_i - l_j)) over the pairs with
    L_i > L_j, twice. Computed from logits: no saturation, finite for any input.
    """
    predicted_loss = predicted_loss.float()
    patch_loss = patch_loss.detach().float()
    difference = predicted_loss[:, :, None] - predicted_loss[:, None, :]
    harder = patch_loss[:, :, None] > patch_loss[:, None, :]
    total = (F.softplus(-difference) * harder).sum()
    return 2 * total, 2 * harder.sum().float()


def absolute_loss(predicted_loss: PatchLoss, patch_loss: PatchLoss) -> Scalar:
    """MSE to the patch losses standardised per image (unbiased variance, eps 1e-6; ablation)."""
    patch_loss = patch_loss.detach().float()
    mean = patch_loss.mean(-1, keepdim=True)
    std = (patch_loss.var(-1, keepdim=True) + 1e-6).sqrt()
    return (predicted_loss.float() - (patch_loss - mean) / std).square().mean()


def ranking_accuracy(predicted_loss: PatchLoss, patch_loss: PatchLoss) -> Scalar:
    """Share of pairs with L_i != L_j that the predictor puts in the right order; 0.5 is chance.

    A tie of the predictions counts one half. NaN where no pair differs.
    """
    harder = patch_loss[:, :, None] > patch_loss[:, None, :]
    difference = predicted_loss[:, :, None] - predicted_loss[:, None, :]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return torch.where(harder, right, 0.0).sum() / harder.sum()

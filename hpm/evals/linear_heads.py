"""Linear probe heads, trained for all hyper-parameters of a grid at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hpm.evals.probing import CHOOSING, FLOAT32, TESTED, Heads, HyperParameters
from hpm.models.linear import linear


class LinearHeads(Heads):
    """Batch norm without affine parameters and a linear layer; two copies for every point of the
    grid.

    Trained by SGD with Nesterov momentum. Most of the time is spent in matrix products and the
    softmax of [batch, heads * classes], so the gradient of the cross-entropy is computed explicitly
    instead of by autograd, and large arrays are reused.

    Args:
        feature_shape: [D] of one image.
        num_classes: C.
        grid: hyper-parameters of each head; learning rates are per 256 images.
        batch_size: images per step.
    """

    MOMENTUM = 0.9
    weight: Tensor
    bias: Tensor
    weight_velocity: Tensor
    bias_velocity: Tensor
    peak: Tensor
    weight_decay: Tensor

    def __init__(
        self,
        feature_shape: torch.Size,
        num_classes: int,
        grid: Sequence[HyperParameters],
        batch_size: int,
    ):
        super().__init__()
        (dim,) = feature_shape
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, momentum=None, affine=False)
        self.shape = (2, len(grid), num_classes)
        outputs = 2 * len(grid) * num_classes

        def per_output(values: list[float]) -> Tensor:
            return torch.tensor(values)[None, :, None].expand(self.shape).reshape(outputs)

        self.register_buffer("weight", torch.zeros(outputs, dim))
        self.register_buffer("bias", torch.zeros(outputs))
        self.register_buffer("weight_velocity", torch.zeros(outputs, dim))
        self.register_buffer("bias_velocity", torch.zeros(outputs))
        self.register_buffer("peak", per_output([point.lr * batch_size / 256 for point in grid]))
        self.register_buffer("weight_decay", per_output([point.weight_decay for point in grid]))
        self._probabilities = torch.empty(0)

    @staticmethod
    def memory(feature_shape: torch.Size, num_classes: int, batch_size: int) -> int:
        """See `Heads.memory`."""
        (dim,) = feature_shape
        weights = 4 * dim  # weight, velocity, and for one copy at a time gradient and step
        logits = 2 * batch_size  # and their softmax
        return FLOAT32 * 2 * num_classes * (weights + logits)

    def forward(
        self, features: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "grid 2 batch classes"]:
        logits = linear(self.norm(features), self.weight, self.bias)
        return logits.view(len(features), *self.shape).permute(2, 1, 0, 3)

    @torch.no_grad()
    def learn(
        self,
        features: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        seen: Bool[Tensor, " batch"],
        rate: float,
    ) -> None:
        """One step at `rate` times each head's learning rate. The CHOOSING copies learn only from
        the images in `seen`."""
        normed = self.norm(features)
        error = self._softmax(linear(normed, self.weight, self.bias))
        index = labels[:, None, None].expand(-1, error.shape[1], 1)
        error.scatter_add_(2, index, error.new_full((1,), -1.0).expand_as(index))
        error = error.view(len(features), -1)
        half = error.shape[1] // 2
        share = {
            CHOOSING: seen.to(features.dtype) / seen.sum().clamp(min=1),
            TESTED: torch.full_like(features[:, 0], 1 / len(features)),
        }
        for copy, weights in share.items():
            rows = slice(copy * half, (copy + 1) * half)
            gradient = error[:, rows].T @ (normed * weights[:, None])
            step = rate * self.peak[rows]
            self._descend(
                self.weight[rows],
                gradient,
                self.weight_velocity[rows],
                step[:, None],
                self.weight_decay[rows, None],
            )
            self._descend(
                self.bias[rows],
                weights @ error[:, rows],
                self.bias_velocity[rows],
                step,
                self.weight_decay[rows],
            )

    def _softmax(self, logits: Tensor) -> Tensor:
        """Softmax [batch heads classes], in a buffer that is reused by the next step."""
        logits = logits.view(len(logits), -1, self.shape[2])
        if self._probabilities.shape != logits.shape:
            self._probabilities = torch.empty_like(logits)
        return torch.softmax(logits, -1, out=self._probabilities)

    def _descend(
        self, parameter: Tensor, gradient: Tensor, velocity: Tensor, step: Tensor, decay: Tensor
    ) -> None:
        """A step like that of torch.optim.SGD with Nesterov momentum and weight decay."""
        gradient.addcmul_(decay.expand_as(parameter), parameter)
        velocity.mul_(self.MOMENTUM).add_(gradient)
        parameter.sub_(step * (gradient + self.MOMENTUM * velocity))

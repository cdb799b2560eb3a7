"""A linear layer that uses a faster kernel on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters and values."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, in float32 on a CPU by oneDNN, which fuses the bias into the product. PyTorch
    first copies the bias to the whole output."""
    use_default = (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or ONEDNN is None
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    )
    return F.linear(x, weight, bias) if use_default else OneDnnLinear.apply(x, weight, bias)


def _onednn() -> Any:
    """PyTorch's oneDNN operator, or None if this build lacks it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


ONEDNN = _onednn()


class OneDnnLinear(torch.autograd.Function):
    """Adds a backward pass to oneDNN's operator, which has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return ONEDNN(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        x_gradient = weight_gradient = bias_gradient = None
        if need_x:
            x_gradient = ONEDNN(gradient, weight.t(), None, "none", [], "").view(x.shape)
        if need_weight:
            weight_gradient = gradient.t() @ x.flatten(0, -2)
        if need_bias:
            bias_gradient = gradient.sum(0)
        return x_gradient, weight_gradient, bias_gradient

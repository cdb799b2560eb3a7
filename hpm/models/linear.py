"""The linear layer: PyTorch's, but for a faster kernel on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Linear(nn.Linear):
    """As `nn.Linear`, of the same names and values."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`. In float32 on a CPU by oneDNN, which adds the bias while it multiplies; PyTorch's
    own way copies the bias to the whole output first and then has the product added to it."""
    plain = (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or ONEDNN is None
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    )
    return F.linear(x, weight, bias) if plain else OneDnnLinear.apply(x, weight, bias)


def _onednn() -> Any:
    """PyTorch's operator for it, where this build has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


ONEDNN = _onednn()


class OneDnnLinear(torch.autograd.Function):
    """The kernel of the compiler's CPU backend has no gradient of its own."""

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

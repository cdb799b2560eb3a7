"""Attentive probe heads, trained for all hyper-parameters of a grid at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.evals.probing import CHOOSING, FLOAT32, TESTED, Heads, HyperParameters


def attention_heads(dim: int) -> int:
    """Number of attention heads on features of this width: one for each 64, as in a ViT."""
    return max(1, dim // 64)


class AttentiveHeads(Heads):
    """Batch norm without affine parameters, cross-attention of one learned query to the patches,
    and a linear layer; two copies for every point of the grid.

    Common for masked image models, whose patches contain more than their mean. With a single query,
    keys and values of the patches need not be computed: query times key is the product of a patch
    with a fixed vector (the key's bias cancels in the softmax), and the mean of values is the value
    of the mean. Each head thus costs two dot products per patch instead of two matrix products.
    """

    def __init__(
        self,
        feature_shape: torch.Size,
        num_classes: int,
        grid: Sequence[HyperParameters],
        batch_size: int,
    ):
        super().__init__()
        _, dim = feature_shape
        heads = attention_heads(dim)
        head_dim = dim // heads
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, momentum=None, affine=False)
        projection = torch.empty(2, heads, head_dim, dim).uniform_(-(dim**-0.5), dim**-0.5)
        output = torch.empty(num_classes, heads * head_dim)
        output.uniform_(-((heads * head_dim) ** -0.5), (heads * head_dim) ** -0.5)
        start = {
            "query": 0.02 * torch.randn(heads, head_dim),
            "key": projection[0],
            "value": projection[1],
            "value_bias": torch.zeros(heads, head_dim),
            "output": output,
            "output_bias": torch.zeros(num_classes),
        }
        # [2, ...] each: both copies of a head have the same initial weights.
        self.parts = nn.ModuleList(
            nn.ParameterDict({name: torch.stack([t, t]) for name, t in start.items()}) for _ in grid
        )
        self.grid = grid
        self._optimizer: torch.optim.Optimizer | None = None

    @staticmethod
    def memory(feature_shape: torch.Size, num_classes: int, batch_size: int) -> int:
        """See `Heads.memory`."""
        patches, dim = feature_shape
        heads = attention_heads(dim)
        weights = dim * (2 * dim + num_classes)
        logits = batch_size * num_classes
        attention = batch_size * heads * (patches + dim)
        # Weights: they, their gradient and AdamW's two moments, and the stack with its gradient.
        # The rest: themselves, what the next function keeps of them, and the gradients of both.
        return FLOAT32 * 2 * (6 * weights + 4 * (logits + attention))

    def forward(
        self, features: Float[Tensor, "batch patches dim"]
    ) -> Float[Tensor, "grid 2 batch classes"]:
        patches = self.norm(features.transpose(1, 2)).transpose(1, 2)
        query, key, value, value_bias, output, output_bias = (
            torch.stack([part[name] for part in self.parts])  # type: ignore[index]
            for name in ("query", "key", "value", "value_bias", "output", "output_bias")
        )
        projected_query = torch.einsum("schd,schde->sche", query, key) / query.shape[-1] ** 0.5
        points, copies, heads, dim = projected_query.shape
        weights = (patches @ projected_query.view(-1, dim).T).softmax(1)
        means = (weights.transpose(1, 2) @ patches).view(-1, points, copies, heads, dim)
        pooled = torch.einsum("bsche,schde->scbhd", means, value) + value_bias[:, :, None]
        return pooled.flatten(3) @ output.transpose(2, 3) + output_bias[:, :, None]

    def learn(
        self,
        features: Float[Tensor, "batch patches dim"],
        labels: Int[Tensor, " batch"],
        seen: Bool[Tensor, " batch"],
        rate: float,
    ) -> None:
        """See `LinearHeads.learn`."""
        if self._optimizer is None:  # the heads are on their device now
            self._optimizer = torch.optim.AdamW(
                {"params": list(part.parameters()), "lr": 0.0, "weight_decay": point.weight_decay}
                for part, point in zip(self.parts, self.grid, strict=True)
            )
        for group, point in zip(self._optimizer.param_groups, self.grid, strict=True):
            group["lr"] = rate * point.lr  # unlike SGD's, not scaled by the batch size
        _loss(self(features), labels, seen).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _loss(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Sum over heads of their mean cross-entropy, for logits [grid 2 B C]. Heads share no
    weights."""
    points, copies, batch, _ = logits.shape
    expected = labels.repeat(points * copies)
    entropy = F.cross_entropy(logits.flatten(0, 2), expected, reduction="none")
    entropy = entropy.view(points, copies, batch)
    choosing = (entropy[:, CHOOSING] * seen).sum() / seen.sum().clamp(min=1)
    return choosing + entropy[:, TESTED].mean(1).sum()

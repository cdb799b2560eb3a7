"""An encoder with a classifier on top, for fine-tuning."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from hpm.models.encoder import Encoder
from hpm.models.vit import LAYER_NORM_EPS

Pool = Literal["mean", "cls"]
HEAD_STD = 2e-5


class Classifier(nn.Module):
    """Pooling, a norm and a linear head (MAE, appendix A.1).

    pool="mean": the mean of the patches, then `fc_norm`, which replaces the encoder's norm.
    pool="cls": the class token (the mean of several) after the encoder's norm. The head is
    initialised near zero (std 2e-5), and position embeddings are trained, except for those of
    `--positions sincos_1d`. Raises ValueError for pool="cls" if the encoder has no class token.
    """

    def __init__(self, encoder: Encoder, num_classes: int, pool: Pool = "mean"):
        super().__init__()
        if pool == "cls" and not encoder.has_class_token:
            raise ValueError("this encoder has no class token to pool")
        self.encoder = encoder
        self.pool = pool
        self.fc_norm: nn.Module = nn.Identity()
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=LAYER_NORM_EPS)
            encoder.norm = nn.Identity()
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        # VideoMAE's positions stay fixed: its files have no place for them.
        if encoder.pos_embed is not None and getattr(encoder, "positions", "") != "sincos_1d":
            encoder.pos_embed.requires_grad_(True)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, images: Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pooled(images))

    def pooled(self, images: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch dim"]:
        """The input of the head."""
        tokens = self.encoder(images)
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        pooled = patches.mean(1) if self.pool == "mean" else self.encoder.pooled_class_token(tokens)
        return self.fc_norm(pooled)

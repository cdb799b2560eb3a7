"""The masked image model: an encoder, a reconstructor and a loss predictor (HPM, section 3)."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.models.encoder import Encoder
from hpm.models.patches import gather_patches, sincos_positions
from hpm.models.vit import LAYER_NORM_EPS, Block, init_weights

Images = Float[Tensor, "batch channels *size"]


class Decoder(nn.Module):
    """Transformer blocks, a norm and a linear head, which reads the last `num_outputs` tokens."""

    def __init__(self, dim: int, depth: int, num_heads: int, output_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, output_dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], num_outputs: int
    ) -> Float[Tensor, "batch outputs values"]:
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, -num_outputs:]))


class MaskedImageModel(nn.Module):
    """Encoder on the visible patches; two decoders of one make on all of them.

    Both decoders read the same `decoder_embed` output, mask token and fixed positions. The
    reconstructor predicts the target of each hidden patch, the predictor (if there is one) the
    loss that this prediction will have.

    Args:
        encoder: runs on images and visible_ids.
        decoder_dim, decoder_depth, decoder_heads: shape of both decoders.
        target_dim: values per patch of the target (default: the patch's pixels).
        with_predictor: False for a plain masked autoencoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        target_dim: int | None = None,
        with_predictor: bool = True,
    ):
        super().__init__()
        pixels = prod(encoder.patch_size) * encoder.channels
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        positions = sincos_positions(encoder.grid, decoder_dim)[None]
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.reconstructor = Decoder(
            decoder_dim, decoder_depth, decoder_heads, target_dim or pixels
        )
        self.predictor = (
            Decoder(decoder_dim, decoder_depth, decoder_heads, pixels) if with_predictor else None
        )
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.reconstructor, self.predictor):
            if part is not None:
                part.apply(init_weights)

    def forward(
        self,
        images: Images,
        visible_ids: Int[Tensor, "batch visible"],
        hidden_ids: Int[Tensor, "batch hidden"],
    ) -> tuple[Float[Tensor, "batch hidden values"], Float[Tensor, "batch hidden"] | None]:
        """Predict targets and losses of the hidden patches from the visible ones."""
        features = self.encoder(images, visible_ids)
        tokens = self._decoder_tokens(features, visible_ids, hidden_ids)
        num_hidden = hidden_ids.shape[1]
        prediction = self.reconstructor(tokens, num_hidden)
        predicted_loss = None
        if self.predictor is not None:
            predicted_loss = self.predictor(tokens, num_hidden).mean(-1)
        return prediction, predicted_loss

    def predict_loss(
        self, images: Images
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch patches"]]:
        """What the teacher does: features and predicted loss of every patch, nothing hidden.

        Raises ValueError where the model has no predictor. The reconstructor is not run.
        """
        if self.predictor is None:
            raise ValueError("this model has no loss predictor")
        features = self.encoder(images)
        prefix = self.decoder_pos_embed[:, :1].expand(-1, self.encoder.num_prefix_tokens, -1)
        positions = torch.cat([prefix, self.decoder_pos_embed[:, 1:]], dim=1)
        tokens = self.decoder_embed(features) + positions
        return features, self.predictor(tokens, self.encoder.num_patches).mean(-1)

    def _decoder_tokens(self, features: Tensor, visible_ids: Tensor, hidden_ids: Tensor) -> Tensor:
        """[B P+N D]: prefix tokens, visible patches, then mask tokens of the hidden ones.

        Attention does not care for the order, so nothing is put back into raster order: each
        token carries its position, and the hidden patches are simply the last. All
        prefix tokens have the one of index 0, which is zeros.
        """
        visible = self.decoder_embed(features)
        hidden = self.mask_token.to(visible.dtype).expand(*hidden_ids.shape, -1)
        positions = self.decoder_pos_embed.expand(len(features), -1, -1)
        prefix = visible_ids.new_zeros(len(features), self.encoder.num_prefix_tokens)
        order = torch.cat([prefix, visible_ids + 1, hidden_ids + 1], dim=1)
        return torch.cat([visible, hidden], dim=1) + gather_patches(positions, order)

"""The masked image model: an encoder, a reconstructor and a loss predictor (HPM, section 3)."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.core.choices import Positions
from hpm.models.encoder import Encoder
from hpm.models.linear import Linear
from hpm.models.patches import POSITIONS, gather_patches, patchify, unpatchify
from hpm.models.seeds import part_seed, seeded
from hpm.models.vit import LAYER_NORM_EPS, Block, init_weights, run_block

Images = Float[Tensor, "batch channels *size"]


class Decoder(nn.Module):
    """Transformer blocks, a norm and a linear head for the last `num_outputs` tokens."""

    def __init__(self, dim: int, depth: int, num_heads: int, output_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = Linear(dim, output_dim)
        self.checkpoint_activations = False

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], num_outputs: int
    ) -> Float[Tensor, "batch outputs values"]:
        return self.head(self.features(tokens, num_outputs))

    def features(
        self, tokens: Float[Tensor, "batch tokens dim"], num_outputs: int
    ) -> Float[Tensor, "batch outputs dim"]:
        """The input of the head."""
        *before, last = self.blocks
        for block in before:
            tokens = run_block(block, tokens, self.checkpoint_activations)
        return self.norm(last(tokens, num_outputs))


class LossPredictor(Decoder):
    """A decoder whose prediction is the mean of its head's outputs, one number per token."""

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], num_outputs: int
    ) -> Float[Tensor, "batch outputs"]:
        features = self.features(tokens, num_outputs)
        # The mean of a linear layer's outputs is one linear layer with its mean weight and bias.
        # In float32, because the order of similar losses matters.
        device_type = "cpu" if features.is_meta else features.device.type  # meta: no autocast
        with torch.autocast(device_type, enabled=False):
            weight, bias = self.head.weight.float().mean(0), self.head.bias.float().mean()
            return features.float() @ weight + bias


class MaskedImageModel(nn.Module):
    """An encoder of the visible patches, and two decoders that run on all patches.

    Both decoders share the output of `decoder_embed`, the mask token and fixed positions. The
    reconstructor predicts the target of each hidden patch; the predictor, if there is one, predicts
    the loss of that prediction.

    Args:
        encoder: called with images and visible_ids.
        decoder_dim, decoder_depth, decoder_heads: shape of both decoders.
        target_dim: values per patch of the target (default: the patch's pixels).
        with_predictor: False for a plain masked autoencoder.
        predictor_dim, predictor_depth, predictor_heads: shape of the predictor, if different.
        predictor_head: `patch`, the mean of as many outputs as a patch has pixels (the paper's), or
            `scalar`.
        detach_predictor: stop the gradient of the predictor's loss at the predictor's input.
        with_cover: have a learned patch that can replace visible ones.
        positions: name of the decoders' fixed positions, see `patches.POSITIONS`.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        target_dim: int | None = None,
        with_predictor: bool = True,
        predictor_dim: int | None = None,
        predictor_depth: int | None = None,
        predictor_heads: int | None = None,
        predictor_head: Literal["patch", "scalar"] = "patch",
        detach_predictor: bool = False,
        with_cover: bool = False,
        positions: Positions = "sincos",
    ):
        super().__init__()
        pixels = prod(encoder.patch_size) * encoder.channels
        self.encoder = encoder
        self.positions = positions
        self.detach_predictor = detach_predictor
        self.decoder_embed = Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(self.fixed_positions(), requires_grad=False)
        self.reconstructor = Decoder(
            decoder_dim, decoder_depth, decoder_heads, target_dim or pixels
        )
        self.predictor = None
        self.predictor_embed: nn.Module = nn.Identity()
        if with_predictor:
            self.predictor = LossPredictor(
                predictor_dim or decoder_dim,
                predictor_depth or decoder_depth,
                predictor_heads or decoder_heads,
                1 if predictor_head == "scalar" else pixels,
            )
            if predictor_dim not in (None, decoder_dim):
                self.predictor_embed = Linear(decoder_dim, predictor_dim)
        self.cover = nn.Parameter(torch.zeros(1, 1, pixels)) if with_cover else None
        self.init_decoder_weights()

    def init_decoder_weights(self, seed: int | None = None) -> None:
        """Initialise everything but the encoder; with a seed, each part from its own derived seed.

        Models of the same seed then have equal weights in all parts that they share.
        """
        for name, part in self.decoder_parts().items():
            with seeded(None if seed is None else part_seed(seed, name)):
                if isinstance(part, nn.Parameter):
                    nn.init.normal_(part, std=0.02)
                elif part is not None:
                    part.apply(init_weights)

    def decoder_parts(self) -> dict[str, nn.Module | nn.Parameter | None]:
        """The parts beside the encoder that have random initial weights, by name."""
        return {
            "decoder_embed": self.decoder_embed,
            "mask_token": self.mask_token,
            "reconstructor": self.reconstructor,
            "predictor_embed": self.predictor_embed,
            "predictor": self.predictor,
        }

    def fixed_positions(self) -> Float[Tensor, "1 tokens dim"]:
        """The decoders' positions: zeros for prefix tokens, then those of every patch."""
        return POSITIONS[self.positions](self.encoder.grid, self.mask_token.shape[-1])[None]

    def forward(
        self,
        images: Images,
        visible_ids: Int[Tensor, "batch visible"],
        hidden_ids: Int[Tensor, "batch hidden"],
        covered_ids: Int[Tensor, "batch covered"] | None = None,
    ) -> tuple[Float[Tensor, "batch hidden values"], Float[Tensor, "batch hidden"] | None]:
        """Predict targets and losses of the hidden patches from the visible ones. Visible patches
        in `covered_ids` are replaced by the learned patch."""
        if covered_ids is not None:
            images = self._with_cover(images, covered_ids)
        features = self.encoder(images, visible_ids)
        tokens = self._decoder_tokens(features, visible_ids, hidden_ids)
        num_hidden = hidden_ids.shape[1]
        prediction = self.reconstructor(tokens, num_hidden)
        if self.predictor is None:
            return prediction, None
        return prediction, self._predicted_loss(tokens, num_hidden)

    def predict_loss(
        self,
        images: Images,
        visible_ids: Int[Tensor, "batch visible"] | None = None,
        hidden_ids: Int[Tensor, "batch hidden"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch predicted"]]:
        """(features, predicted loss of every patch of full images, or of the hidden patches if ids
        are given), as used by the teacher. Does not run the reconstructor.

        Raises ValueError if the model has no predictor.
        """
        if self.predictor is None:
            raise ValueError("this model has no loss predictor")
        features = self.encoder(images, visible_ids)
        if visible_ids is None or hidden_ids is None:
            prefix = self.decoder_pos_embed[:, :1].expand(-1, self.encoder.num_prefix_tokens, -1)
            positions = torch.cat([prefix, self.decoder_pos_embed[:, 1:]], dim=1)
            tokens = self.decoder_embed(features) + positions
            return features, self._predicted_loss(tokens, self.encoder.num_patches)
        tokens = self._decoder_tokens(features, visible_ids, hidden_ids)
        return features, self._predicted_loss(tokens, hidden_ids.shape[1])

    def _predicted_loss(self, tokens: Tensor, num_outputs: int) -> Tensor:
        assert self.predictor is not None
        if self.detach_predictor:
            tokens = tokens.detach()
        return self.predictor(self.predictor_embed(tokens), num_outputs)

    def _with_cover(self, images: Images, covered_ids: Tensor) -> Images:
        """Replace patches of the images by the learned patch."""
        assert self.cover is not None
        patches = patchify(images, self.encoder.patch_size)
        cover = self.cover.to(patches.dtype).expand(*covered_ids.shape, -1)
        index = covered_ids[..., None].expand_as(cover)
        patches = patches.scatter(1, index, cover)
        return unpatchify(patches, self.encoder.grid, self.encoder.patch_size)

    def _decoder_tokens(self, features: Tensor, visible_ids: Tensor, hidden_ids: Tensor) -> Tensor:
        """[B P+N D]: prefix tokens, visible patches, then mask tokens of the hidden ones.

        Tokens are not put back into raster order, because attention is permutation-equivariant and
        each token carries its position. All prefix tokens have position 0, which is zeros.
        """
        visible = self.decoder_embed(features)
        hidden = self.mask_token.to(visible.dtype).expand(*hidden_ids.shape, -1)
        positions = self.decoder_pos_embed.expand(len(features), -1, -1)
        prefix = visible_ids.new_zeros(len(features), self.encoder.num_prefix_tokens)
        order = torch.cat([prefix, visible_ids + 1, hidden_ids + 1], dim=1)
        return torch.cat([visible, hidden], dim=1) + gather_patches(positions, order)

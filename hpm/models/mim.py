"""The masked image model: an encoder, a reconstructor and a loss predictor (HPM, section 3)."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm.models.encoder import Encoder
from hpm.models.linear import Linear
from hpm.models.patches import gather_patches, patchify, sincos_positions, unpatchify
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
        """What the head reads."""
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
        # In float32: the order of nearby losses is what is learned, and what is mined by.
        device_type = "cpu" if features.is_meta else features.device.type  # meta: no autocast
        with torch.autocast(device_type, enabled=False):
            weight, bias = self.head.weight.float().mean(0), self.head.bias.float().mean()
            return features.float() @ weight + bias


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
        predictor_dim, predictor_depth, predictor_heads: where the predictor's shape is its own.
        predictor_head: `patch`, the mean of as many outputs as a patch has pixels (the paper's), or
            `scalar`.
        detach_predictor: keep the predictor's loss from all but the predictor.
        with_cover: have a learned patch, which can take the place of visible ones.
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
    ):
        super().__init__()
        pixels = prod(encoder.patch_size) * encoder.channels
        self.encoder = encoder
        self.detach_predictor = detach_predictor
        self.decoder_embed = Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        positions = sincos_positions(encoder.grid, decoder_dim)[None]
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
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
        """Initialise everything but the encoder; with a seed, each part from a seed of its own.

        Two models of the same seed then differ only in the parts that one of them lacks.
        """
        parts: dict[str, nn.Module | nn.Parameter | None] = {
            "decoder_embed": self.decoder_embed,
            "mask_token": self.mask_token,
            "reconstructor": self.reconstructor,
            "predictor_embed": self.predictor_embed,
            "predictor": self.predictor,
        }
        for name, part in parts.items():
            with seeded(None if seed is None else part_seed(seed, name)):
                if isinstance(part, nn.Parameter):
                    nn.init.normal_(part, std=0.02)
                elif part is not None:
                    part.apply(init_weights)

    def forward(
        self,
        images: Images,
        visible_ids: Int[Tensor, "batch visible"],
        hidden_ids: Int[Tensor, "batch hidden"],
        covered_ids: Int[Tensor, "batch covered"] | None = None,
    ) -> tuple[Float[Tensor, "batch hidden values"], Float[Tensor, "batch hidden"] | None]:
        """Predict targets and losses of the hidden patches from the visible ones, of which those
        in `covered_ids` show a learned patch instead of theirs."""
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
        """What the teacher does: features, and predicted loss of every patch of whole images, or of
        the hidden patches where ids are given.

        Raises ValueError where the model has no predictor. The reconstructor is not run.
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
        """The images with the learned patch in some places: nothing of what was there is left."""
        assert self.cover is not None
        patches = patchify(images, self.encoder.patch_size)
        cover = self.cover.to(patches.dtype).expand(*covered_ids.shape, -1)
        index = covered_ids[..., None].expand_as(cover)
        patches = patches.scatter(1, index, cover)
        return unpatchify(patches, self.encoder.grid, self.encoder.patch_size)

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

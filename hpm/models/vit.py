"""A Vision Transformer encoder that can run on a subset of its patches. Parameter names are
timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpm.core.choices import Positions
from hpm.models.encoder import Encoder
from hpm.models.linear import Linear, linear
from hpm.models.patches import (
    POSITIONS,
    Size,
    gather_patches,
    grid_size,
    interpolate_positions,
    patchify,
)
from hpm.models.windows import Windows, window_attention

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a dimension of {dim}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        num_outputs: int | None = None,
        windows: Windows | None = None,
    ) -> Float[Tensor, "batch outputs dim"]:
        """Attention of all tokens, or of only the last `num_outputs` tokens, to all tokens; with
        `windows`, of patches within their window."""
        if num_outputs is None:
            q, k, v = self._heads(x)
        else:
            q, k, v = self._last_heads(x, num_outputs)
        if windows is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = window_attention(q, k, v, windows)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _last_heads(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the last `count` tokens, keys and values of all."""
        batch, tokens, dim = x.shape
        size = dim // self.num_heads
        q = linear(x[:, -count:], self.qkv.weight[:dim], self.qkv.bias[:dim])
        kv = linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:])
        q = q.view(batch, count, self.num_heads, size).transpose(1, 2)
        k, v = kv.view(batch, tokens, 2, self.num_heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def of_first_tokens(
        self, x: Float[Tensor, "batch tokens dim"], count: int
    ) -> Float[Tensor, "batch heads tokens"]:
        """Attention weights of the first `count` tokens, their mean; each row sums to 1."""
        q, k, _ = self._heads(x)
        scores = q[:, :, :count] @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        return scores.float().softmax(-1).mean(2)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B heads tokens D/heads]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch at random for each sample, and scales
    the others up to keep the expectation."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        num_outputs: int | None = None,
        windows: Windows | None = None,
    ) -> Float[Tensor, "batch outputs dim"]:
        """Output of all tokens, or of only the last `num_outputs`, without computing the others.
        With `windows`, patches attend within their window."""
        attended = self.drop_path(self.attn(self.norm1(x), num_outputs, windows))
        x = (x if num_outputs is None else x[:, -num_outputs:]) + attended
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention_of_first_tokens(
        self, x: Float[Tensor, "batch tokens dim"], count: int
    ) -> Float[Tensor, "batch heads tokens"]:
        """Mean attention weights of the first `count` tokens in this block, given its input."""
        return self.attn.of_first_tokens(self.norm1(x), count)


def run_block(block: nn.Module, x: Tensor, checkpoint_activations: bool, **options: Any) -> Tensor:
    """Run a block, optionally with activation checkpointing."""
    if checkpoint_activations and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **options)
    return block(x, **options)


class PatchEmbed(nn.Module):
    """Linear projection of patches, with its weight shaped as timm's convolution."""

    def __init__(self, patch_size: tuple[int, ...], channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(patch_size)]
        self.proj = convolution(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, patches: Float[Tensor, "batch patches values"]
    ) -> Float[Tensor, "batch patches dim"]:
        # Unlike a convolution, this embeds only visible patches: it is cheaper, and no hidden pixel
        # can reach the encoder.
        weight = self.proj.weight.movedim(1, -1).flatten(1)
        return linear(patches, weight, self.proj.bias)


class VisionTransformer(Encoder):
    """ViT encoder with fixed sine-cosine positions, for images or clips.

    Args:
        image_size: pixels along each axis, e.g. (224, 224); need not be square. Of clips: (frames,
            height, width).
        patch_size: pixels of a patch along each axis; each must divide the image's.
        channels: of the images.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP, relative to `embed_dim`.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        window_size: side of the attention windows in patches. The last block of every quarter
            attends globally (ViTDet). Default: all blocks attend globally. No weight depends on it,
            so it may be changed at any time.
        positions: name of the fixed positions, see `patches.POSITIONS`.
        class_tokens: number of class tokens; 0 for patch tokens only.
        final_norm: False for tokens as the last block gives them.

    Raises:
        ValueError: if the sizes do not match.
    """

    def __init__(
        self,
        image_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (16, 16),
        channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        window_size: int | None = None,
        positions: Positions = "sincos",
        class_tokens: int = 1,
        final_norm: bool = True,
    ):
        super().__init__()
        self.window_size = window_size
        self.set_sizes(image_size, patch_size, channels)
        self.embed_dim = embed_dim
        self.num_prefix_tokens = self.num_class_tokens = class_tokens
        self.has_class_token = class_tokens > 0
        self.positions = positions

        self.patch_embed = PatchEmbed(self.patch_size, channels, embed_dim)
        self.cls_token = (
            nn.Parameter(torch.empty(1, class_tokens, embed_dim)) if class_tokens else None
        )
        self.pos_embed = nn.Parameter(self.fixed_positions(self.grid), requires_grad=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates]
        )
        norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS) if final_norm else nn.Identity()
        self.norm: nn.Module = norm
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def forward(
        self,
        images: Float[Tensor, "batch channels *size"],
        visible_ids: Int[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised images -> class tokens if any, then one token per visible patch (default:
        all)."""
        x = self._embed(images, visible_ids)
        options = self._block_options(images, visible_ids)
        for block, block_options in zip(self.blocks, options, strict=True):
            x = run_block(block, x, self.checkpoint_activations, **block_options)
        return self.norm(x)

    def feature_maps(
        self, images: Float[Tensor, "batch channels *size"], blocks: Sequence[int]
    ) -> list[Float[Tensor, "batch dim *grid"]]:
        """Patch tokens after each of these blocks (numbered from 0), not normed, as maps.

        The images may have another size than the encoder's: positions are interpolated.
        """
        x, maps = self._embed(images, None), {}
        for number, options in enumerate(self._block_options(images, None)):
            x = run_block(self.blocks[number], x, self.checkpoint_activations, **options)
            if number in blocks:
                maps[number] = self.patch_map(x, images.shape[2:])
        return [maps[number] for number in blocks]

    def _block_options(self, images: Tensor, visible_ids: Tensor | None) -> list[dict[str, Any]]:
        """Keyword arguments of each block: its windows, if it has any."""
        if self.window_size is None:
            return [{}] * len(self.blocks)
        if visible_ids is not None:
            raise ValueError("window attention needs all patches of an image")
        windows = Windows(grid_size(images.shape[2:], self.patch_size), self.window_size)
        global_blocks = quarter_ends(len(self.blocks))
        return [{} if n in global_blocks else {"windows": windows} for n in range(len(self.blocks))]

    def with_attention(
        self, images: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads patches"]]:
        """Features of full images, and the attention of the class token (the mean of several) to
        the patches in the last block. Raises ValueError without a class token."""
        if self.cls_token is None:
            raise ValueError("this encoder has no class token")
        x = self._embed(images, None)
        *before, final = self.blocks
        options = self._block_options(images, None)
        for block, block_options in zip(before, options, strict=False):
            x = block(x, **block_options)
        last: Any = final
        count = self.num_class_tokens
        attention = last.attention_of_first_tokens(x, count)[..., count:]
        return self.norm(last(x)), attention

    def _embed(self, images: Tensor, visible_ids: Tensor | None) -> Tensor:
        """Class tokens, if any, and visible patches with their positions."""
        batch = images.shape[0]  # len(images) would be a constant in an exported graph
        patches = patchify(images, self.patch_size)
        assert self.pos_embed is not None
        grid = grid_size(images.shape[2:], self.patch_size)
        pos_embed = self._resampled(self.pos_embed, self.grid, grid)
        positions = pos_embed[:, self.num_prefix_tokens :].expand(batch, -1, -1)
        if visible_ids is not None:
            patches = gather_patches(patches, visible_ids)
            positions = gather_patches(positions, visible_ids)
        x = self.patch_embed(patches) + positions
        if self.cls_token is None:
            return x
        positions = self.pos_embed[:, : self.num_class_tokens]
        cls_token = (self.cls_token + positions).expand(batch, -1, -1)
        return torch.cat([cls_token, x], dim=1)

    def fixed_positions(self, grid: Size) -> Float[Tensor, "1 tokens dim"]:
        """The positions of a new encoder: zeros for class tokens, and those of every patch."""
        positions = POSITIONS[self.positions](grid, self.embed_dim)[None, 1:]
        return F.pad(positions, (0, 0, self.num_class_tokens, 0))

    def fit_positions(self, weights: dict[str, Tensor], grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Resample the positions in weights of the same encoder from `grid` to this one's grid."""
        return weights | {"pos_embed": self._resampled(weights["pos_embed"], grid, self.grid)}

    def _resampled(self, positions: Tensor, grid: Size, new_grid: Size) -> Tensor:
        """Positions of another grid: interpolated, or computed anew if they are by number."""
        if self.positions == "sincos_1d" and grid != new_grid:
            return self.fixed_positions(new_grid).to(positions)
        return interpolate_positions(positions, grid, new_grid)


def quarter_ends(depth: int) -> list[int]:
    """0-based indices of the last block of each quarter of an encoder."""
    return [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights of linear layers and patch projections, zero biases, norms of one."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)

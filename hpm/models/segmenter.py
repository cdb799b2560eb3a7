"""Encoders with a head that classifies every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core.errors import UserError
from hpm.models.encoder import Encoder
from hpm.models.pyramid import NormLayer, blocks_to_read, doublings, rescaling
from hpm.models.upernet import CLASSIFIER_STD, FCNHead, UPerNetHead, resize

AUXILIARY_WEIGHT = 0.4
IGNORED = 255


class LinearSegmenter(nn.Module):
    """A linear layer on frozen patch tokens; its logits are upsampled to the image.

    The tokens are standardised by a batch norm without affine parameters, as in MAE's linear
    probing (appendix A.1): encoders differ in the scale of their features, and this makes learning
    rates comparable. The result is still a linear function of the features.

    Args:
        encoder: any encoder, whose weights are frozen here.
        num_classes: number of classes.
    """

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = nn.BatchNorm2d(encoder.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Conv2d(encoder.embed_dim, num_classes, 1)
        nn.init.normal_(self.head.weight, std=CLASSIFIER_STD)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Normalised images -> logits of every pixel."""
        return resize(self.head(self.norm(self.features(images))), images.shape[2:])

    @torch.no_grad()
    def features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The features before standardisation, which several heads can share."""
        return self.encoder.patch_map(self.encoder(images), images.shape[2:])


class UPerNetSegmenter(nn.Module):
    """A plain Vision Transformer with UPerNet's head, fine-tuned as a whole (BEiT, Bao et al. 2022;
    MAE, appendix A.4).

    Maps of four blocks are rescaled to strides 4, 8, 16 and 32 by transposed convolutions and
    max-pooling. In training, an auxiliary FCN head reads the third. The encoder's final norm is
    removed, and position embeddings are trained.

    Args:
        encoder: a plain ViT, with its own stochastic depth.
        num_classes: number of classes.
        channels: of the head. Default: the encoder's width.
        blocks: 0-based indices of the four blocks to read. Default: see `blocks_to_read`.
        auxiliary_channels: of the FCN head.
        norm_layer: called with the number of channels. Batch statistics are per process; pass
            nn.SyncBatchNorm, or call nn.SyncBatchNorm.convert_sync_batchnorm on the model, to
            synchronise them (on GPUs).
        dropout: rate before the classifiers.

    Raises:
        UserError: if the encoder's patches are not square.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        channels: int | None = None,
        blocks: Sequence[int] | None = None,
        auxiliary_channels: int = 256,
        norm_layer: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.1,
    ):
        super().__init__()
        dim = encoder.embed_dim
        times = doublings(encoder)
        self.encoder = encoder
        self.blocks = list(blocks) if blocks is not None else blocks_to_read(len(encoder.blocks))
        if len(self.blocks) != len(times):
            raise ValueError(f"UPerNet reads {len(times)} blocks, not {len(self.blocks)}")
        self.pyramid = nn.ModuleList(
            rescaling(n, [dim] * (max(n, 0) + 1), norm_layer) for n in times
        )
        self.channels = channels or dim
        self.head = UPerNetHead(dim, self.channels, num_classes, len(times), norm_layer, dropout)
        self.auxiliary = FCNHead(dim, num_classes, auxiliary_channels, norm_layer, dropout)
        encoder.norm = nn.Identity()
        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(True)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> (
        Float[Tensor, "batch classes height width"]
        | tuple[
            Float[Tensor, "batch classes height width"], Float[Tensor, "batch classes height width"]
        ]
    ):
        """Normalised images -> logits of every pixel; in training, also the auxiliary ones.

        Raises UserError in training with a single image, because batch norm needs several.
        """
        if self.training and len(images) == 1 and not self._any_batch_size():
            raise UserError("UPerNet cannot be trained on batches of one image: take 2 or more")
        maps = self.feature_pyramid(images)
        logits = resize(self.head(maps), images.shape[2:])
        if not self.training:
            return logits
        return logits, resize(self.auxiliary(maps[2]), images.shape[2:])

    def feature_pyramid(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch dim _ _"]]:
        """The maps that the heads read, of strides 4, 8, 16 and 32."""
        maps = self.encoder.feature_maps(images, self.blocks)
        return [rescale(x) for rescale, x in zip(self.pyramid, maps, strict=True)]

    def _any_batch_size(self) -> bool:
        """Whether no norm needs a batch of several images."""
        return not any(type(m) is nn.BatchNorm2d for m in self.modules())


def segmentation_loss(
    main: Float[Tensor, "batch classes height width"],
    auxiliary: Float[Tensor, "batch classes height width"] | None,
    labels: Integer[Tensor, "batch height width"],
    ignore: int = IGNORED,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labelled pixels, plus 0.4 times that of the auxiliary head (Zhao
    et al. 2017). 0 if no pixel has a label."""
    labels = labels.long()
    labelled = (labels != ignore).sum().clamp(min=1)
    total = main.new_zeros((), dtype=torch.float32)
    for logits, weight in ((main, 1.0), (auxiliary, AUXILIARY_WEIGHT)):
        if logits is not None:
            loss = F.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="sum")
            total = total + weight * loss / labelled
    return total


def sliding_window(
    model: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch channels height width"],
    window: int,
    stride: int,
    num_classes: int,
    batch_size: int = 16,
) -> Float[Tensor, "batch {num_classes} height width"]:
    """Sliding-window inference: logits of full images from a model of square windows.

    Windows are `stride` pixels apart, the last along each axis at the border. Logits are averaged
    where windows overlap. Images smaller than a window are zero-padded at the bottom and right. At
    most `batch_size` windows are passed to the model at once.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"a stride of {stride} leaves gaps between windows of {window} pixels")
    height, width = images.shape[2:]
    padded = F.pad(images, (0, max(0, window - width), 0, max(0, window - height)))
    rows, columns = (_starts(side, window, stride) for side in padded.shape[2:])
    places = [
        (image, slice(row, row + window), slice(column, column + window))
        for image in range(len(images))
        for row in rows
        for column in columns
    ]
    total = padded.new_zeros(len(images), num_classes, *padded.shape[2:], dtype=torch.float32)
    count = padded.new_zeros(len(images), 1, *padded.shape[2:], dtype=torch.float32)
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        logits = model(torch.stack([padded[image, :, y, x] for image, y, x in some]))
        for (image, y, x), scores in zip(some, logits, strict=True):
            total[image, :, y, x] += scores
            count[image, :, y, x] += 1
    return (total / count)[:, :, :height, :width]


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Start of each window along one axis."""
    last = side - window
    return [*range(0, last, stride), last]

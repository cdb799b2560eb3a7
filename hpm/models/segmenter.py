"""Encoders with a head that says the class of every pixel."""

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
    """Frozen features and one linear layer on the patch tokens, upsampled to the image.

    The tokens are standardised by a batch norm without weights of its own, as MAE does for linear
    probing (appendix A.1): encoders differ in the scale of their features, and so a learning rate
    means the same for all of them, while the whole stays a linear function of the features.

    Args:
        encoder: any; its weights are frozen here.
        num_classes: what is scored.
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
        """What the head reads, before it is standardised; the same for every head, so it can be
        computed once for several."""
        return self.encoder.patch_map(self.encoder(images), images.shape[2:])


class UPerNetSegmenter(nn.Module):
    """A plain Vision Transformer with UPerNet's head, fine-tuned as a whole (BEiT, Bao et al. 2022;
    MAE, appendix A.4).

    Maps of four blocks are brought to strides 4, 8, 16 and 32 by transposed convolutions and
    max-pooling. An FCN head on the third of them helps in training. The encoder's own norm, which
    stands behind its last block, is left out, and positions are trained along.

    Args:
        encoder: a plain ViT; stochastic depth is its own.
        num_classes: what is scored.
        channels: of the head. Default: the encoder's width.
        blocks: the four that are read, numbered from 0. Default: see `blocks_to_read`.
        auxiliary_channels: of the FCN head.
        norm_layer: makes the norm of that many channels. Batch statistics are those of one process;
            pass nn.SyncBatchNorm, or call nn.SyncBatchNorm.convert_sync_batchnorm on the model, to
            take them over all processes (on GPUs).
        dropout: rate before the classifiers.

    Raises:
        UserError: where the encoder has no square patches.
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
        """Normalised images -> logits of every pixel; in training, those of the auxiliary head as
        well.

        Raises UserError in training on a single image, which has no statistics of a batch.
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
        """Whether no norm needs the statistics of several images of this process."""
        return not any(type(m) is nn.BatchNorm2d for m in self.modules())


def segmentation_loss(
    main: Float[Tensor, "batch classes height width"],
    auxiliary: Float[Tensor, "batch classes height width"] | None,
    labels: Integer[Tensor, "batch height width"],
    ignore: int = IGNORED,
) -> Float[Tensor, ""]:
    """Cross-entropy, its mean over the pixels that have a label; that of the auxiliary head counts
    0.4 (Zhao et al. 2017). 0 where no pixel has a label."""
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
    """Logits of whole images from a model that reads square windows of them.

    Windows stand `stride` pixels apart, the last of each axis at the border; where they overlap,
    logits are averaged. Images smaller than the window are padded with zeros below and to the
    right. `batch_size` windows at most pass the model at once.
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
    """Where windows along one axis begin."""
    last = side - window
    return [*range(0, last, stride), last]

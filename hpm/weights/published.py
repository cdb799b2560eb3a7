"""Checkpoints of the published implementations of Hard Patches Mining and of MAE."""

from __future__ import annotations

from typing import ClassVar

from hpm.weights.contents import ReadableFormat
from hpm.weights.renaming import Rules, starts


class PublishedMae(ReadableFormat):
    """MAE (He et al. 2022): timm's names, with the prefix `decoder_` for the decoder."""

    description = "a masked autoencoder (MAE) with its decoder"
    rules: ClassVar[Rules] = (
        (r"^decoder_(blocks|norm)\.", r"reconstructor.\1."),
        (r"^decoder_pred\.", "reconstructor.head."),
        (r"^(?=cls_token|pos_embed|patch_embed\.|blocks\.|norm\.)", "encoder."),
    )
    has_decoder = True

    def matches(self, names: set[str]) -> bool:
        encoder = "patch_embed.proj.weight" in names and starts(names, "blocks.0.")
        return encoder and starts(names, "decoder_blocks.")


class PublishedHpm(PublishedMae):
    """HPM (Wang et al. 2023): MAE's names, with the suffix `_losspred` for the predictor."""

    description = "a published checkpoint of Hard Patches Mining"
    rules = (
        (r"^decoder_(blocks|norm)_losspred\.", r"predictor.\1."),
        (r"^decoder_pred_losspred\.", "predictor.head."),
        *PublishedMae.rules,
    )
    has_predictor = True

    def matches(self, names: set[str]) -> bool:
        encoder = "patch_embed.proj.weight" in names and starts(names, "blocks.0.")
        return encoder and starts(names, "decoder_blocks_losspred.")

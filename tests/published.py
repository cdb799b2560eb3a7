"""The published implementation's weight names, mapped to ours."""

from torch import Tensor

PREFIXES = {
    "decoder_blocks_losspred.": "predictor.blocks.",
    "decoder_norm_losspred.": "predictor.norm.",
    "decoder_pred_losspred.": "predictor.head.",
    "decoder_blocks.": "reconstructor.blocks.",
    "decoder_norm.": "reconstructor.norm.",
    "decoder_pred.": "reconstructor.head.",
    "decoder_embed.": "decoder_embed.",
    "decoder_pos_embed": "decoder_pos_embed",
    "mask_token": "mask_token",
}


def our_name(published: str) -> str:
    for prefix, ours in PREFIXES.items():
        if published.startswith(prefix):
            return ours + published.removeprefix(prefix)
    return f"encoder.{published}"


def our_state(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, under our names."""
    return {
        our_name(name.removeprefix(prefix)): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }

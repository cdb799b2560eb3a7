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


SHAPE = {
    "image_size": [16, 16],
    "patch_size": [4, 4],
    "channels": 3,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 1,
    "with_predictor": True,
}


def published(model):
    """A model's weights under the names of the published implementation."""
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in PREFIXES.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        state[name.removeprefix("encoder.")] = tensor
    return state

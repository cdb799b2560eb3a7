"""Names of the same tensors here and in other software: pure functions of state dicts.

Ours are those of `MaskedImageModel`: the encoder's are timm's under `encoder.`, beside them the two
decoders `reconstructor.` and `predictor.` with what they share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
Kind = Literal["hpm", "mae", "timm", "hf_vit", "hf_mae"]

ABOUT: dict[Kind, str] = {
    "hpm": "a published checkpoint of Hard Patches Mining",
    "mae": "a masked autoencoder (MAE) with its decoder",
    "timm": "a Vision Transformer under timm's names, without decoders",
    "hf_vit": "a ViT of Hugging Face, without decoders",
    "hf_mae": "a ViTMAE of Hugging Face with its decoder",
}

WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|vit)\.)+")
# Of no use here: what comes behind the encoder, and a mask token that a plain ViT has.
BEHIND = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "pooler.", "classifier.", "embeddings.")

# The longer names come first, as they begin with the shorter ones.
PUBLISHED = (
    (r"^decoder_(blocks|norm)_losspred\.", r"predictor.\1."),
    (r"^decoder_pred_losspred\.", "predictor.head."),
    (r"^decoder_(blocks|norm)\.", r"reconstructor.\1."),
    (r"^decoder_pred\.", "reconstructor.head."),
    (r"^(?=cls_token|pos_embed|patch_embed\.|blocks\.|norm\.)", "encoder."),
)
# Those of files on the hub, and those of transformers since version 5.
HUGGING_FACE = (
    (r"^embeddings\.cls_token$", "encoder.cls_token"),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^(?:encoder\.layer|layers)\.", "encoder.blocks."),
    # The second is what transformers 5 writes of a ViTMAE.
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.", "reconstructor.blocks."),
    (r"^decoder\.decoder_norm\.", "reconstructor.norm."),
    (r"^decoder\.decoder_pred\.", "reconstructor.head."),
    (r"^decoder\.(?=decoder_embed\.|mask_token$|decoder_pos_embed$)", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# The way back, to the names that every version of transformers reads.
TO_HUGGING_FACE = (
    (r"^encoder\.cls_token$", "embeddings.cls_token"),
    (r"^encoder\.pos_embed$", "embeddings.position_embeddings"),
    (r"^encoder\.patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.norm\.", "layernorm."),
    (r"^encoder\.blocks\.", "encoder.layer."),
    (r"^reconstructor\.blocks\.", "decoder.decoder_layers."),
    (r"^reconstructor\.norm\.", "decoder.decoder_norm."),
    (r"^reconstructor\.head\.", "decoder.decoder_pred."),
    (r"^(?=decoder_embed\.|mask_token$|decoder_pos_embed$)", "decoder."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
TO_TORCHVISION = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def recognise(keys: Iterable[str]) -> Kind | None:
    """Whose weights have these names; None for a stranger's."""
    names = {WRAPPERS.sub("", key) for key in keys}

    def some(start: str) -> bool:
        return any(name.startswith(start) for name in names)

    if "embeddings.patch_embeddings.projection.weight" in names:
        return "hf_mae" if some("decoder.decoder_norm.") else "hf_vit"
    if "patch_embed.proj.weight" not in names or not some("blocks.0."):
        return None
    if some("decoder_blocks_losspred."):
        return "hpm"
    return "mae" if some("decoder_blocks.") else "timm"


def to_ours(kind: Kind, state: State) -> tuple[State, list[str]]:
    """The tensors under our names, and the names (the file's) of those that we have no use for."""
    rules = HUGGING_FACE if kind.startswith("hf") else PUBLISHED
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if "norm.weight" not in bare and "fc_norm.weight" in bare:
        # Pooled first and normed then: ours norms each token by it.
        bare = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in bare.items()}
    named = {rename(name, rules): (name, tensor) for name, tensor in bare.items()}
    left = [old for new, (old, _) in named.items() if new.startswith(BEHIND)]
    ours = {new: tensor for new, (_, tensor) in named.items() if not new.startswith(BEHIND)}
    return _with_qkv(ours), left


def to_hugging_face(state: State) -> State:
    """Our encoder (under `encoder.`), and a reconstructor if there is one, for Hugging Face; with a
    reconstructor, the encoder is under `vit.`, as in ViTMAEForPreTraining."""
    renamed = {rename(n, TO_HUGGING_FACE): t for n, t in _without_qkv(state).items()}
    if not any(name.startswith("decoder.") for name in renamed):
        return renamed
    return {n if n.startswith("decoder.") else f"vit.{n}": t for n, t in renamed.items()}


def to_torchvision(state: State) -> State:
    """Our encoder (without `encoder.`) for torchvision's VisionTransformer."""
    return {rename(name, TO_TORCHVISION): tensor for name, tensor in state.items()}


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Every rule that applies, one after another."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _with_qkv(state: State) -> State:
    """Queries, keys and values in one tensor, as ours are; a missing bias is one of zeros."""
    joined = {name: t for name, t in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in state:
        if ".attn.q." in name:
            parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
            if all(part in state for part in parts):
                joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(
                    [state[part] for part in parts]
                )
    for name, tensor in list(joined.items()):
        if name.endswith(".attn.qkv.weight"):
            bias = name.removesuffix("weight") + "bias"
            joined.setdefault(bias, tensor.new_zeros(len(tensor)))
    return joined


def _without_qkv(state: State) -> State:
    split: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            split[name] = tensor
            continue
        for part, third in zip("qkv", tensor.chunk(3), strict=True):
            split[name.replace(".attn.qkv.", f".attn.{part}.")] = third
    return split

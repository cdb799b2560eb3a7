"""Renaming tensors by rules, and joining or splitting queries, keys and values.

Our names are those of `MaskedImageModel`: the encoder's are timm's under `encoder.`, beside them
`reconstructor.` and `predictor.` with what the two decoders share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from hpm.core.files import StateDict

Rules = tuple[tuple[str, str], ...]  # (regular expression, replacement)

# Prefixes added by training scripts, torch.compile and larger models.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|vit|videomae)\.)+")


def unwrap(name: str) -> str:
    """A name without the prefixes of wrapping modules."""
    return WRAPPERS.sub("", name)


def rename(name: str, rules: Rules) -> str:
    """Apply every matching rule, in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def join_qkv(state: StateDict) -> StateDict:
    """Concatenate queries, keys and values into one tensor; a missing bias, of all or of one of
    them, becomes zeros."""
    joined = {name: t for name, t in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in state:
        if ".attn.q." in name:
            parts = [state.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            if name.endswith(".bias"):
                parts = [torch.zeros_like(state[name]) if p is None else p for p in parts]
            found = [part for part in parts if part is not None]
            if len(found) == len(parts):
                joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(found)
    for name, tensor in list(joined.items()):
        if name.endswith(".attn.qkv.weight"):
            bias = name.removesuffix("weight") + "bias"
            joined.setdefault(bias, tensor.new_zeros(len(tensor)))
    return joined


def split_qkv(state: StateDict) -> StateDict:
    """The inverse of `join_qkv`."""
    split: StateDict = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            split[name] = tensor
            continue
        for part, third in zip("qkv", tensor.chunk(3), strict=True):
            split[name.replace(".attn.qkv.", f".attn.{part}.")] = third
    return split


def starts(names: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with the prefix."""
    return any(name.startswith(prefix) for name in names)

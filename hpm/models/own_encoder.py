"""Encoders of the user's own, found by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from hpm.core.errors import UserError, one_line
from hpm.core.plugins import find_class
from hpm.models.encoder import Encoder

ENTRY_POINTS = "hpm.encoders"


def find_encoder(
    name: str, known: Sequence[str] = ("timm/NAME",), trusted: bool = True
) -> type[Encoder]:
    """Find the class of an encoder: `MODULE:CLASS`, or an entry point of the group `hpm.encoders`.

    known: names of the built-in encoders, for the message. trusted: whether the name comes from the
    user, see `find_plugin`. Raises UserError if there is no such class.
    """
    return find_class("model", name, ENTRY_POINTS, known, Encoder, trusted)


def own_encoder(
    name: str,
    image_size: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    drop_path: float = 0.0,
    trusted: bool = False,
) -> Encoder:
    """Build an encoder of the user's own, and fill in the attributes that follow from its
    arguments.

    Raises UserError if the constructor fails, or leaves out `embed_dim` or `blocks`.
    """
    kind = find_encoder(name, trusted=trusted)
    arguments: Any = {
        "image_size": tuple(image_size),
        "patch_size": tuple(patch_size),
        "channels": channels,
        "drop_path": drop_path,
    }
    try:
        encoder = kind(**arguments)
    except UserError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"model {name} could not be built: {problem}") from error
    missing = [
        attribute for attribute in ("embed_dim", "blocks") if not hasattr(encoder, attribute)
    ]
    if missing:
        raise UserError(f"model {name} lacks {' and '.join(missing)}: set it in its constructor")
    encoder.set_sizes(image_size, patch_size, channels)
    if not hasattr(encoder, "pos_embed"):
        encoder.pos_embed = None
    return encoder


def own_shape(
    name: str,
    image_size: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    known: Sequence[str],
) -> dict[str, Any]:
    """The encoder's part of the architecture of an encoder that the user names, tried on a batch.

    Raises UserError if it cannot be imported, built or run.
    """
    kind: Any = find_encoder(name, known)
    return dict(_tried(kind, name, tuple(image_size), tuple(patch_size), channels))


@lru_cache(maxsize=8)  # a run asks several times, and the encoder may be large
def _tried(
    kind: type[Encoder],  # not only its name: the same name may be of another class later
    name: str,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    channels: int,
) -> dict[str, Any]:
    """What the class says about itself, once it has run on a batch."""
    encoder = own_encoder(name, image_size, patch_size, channels, trusted=True).eval()
    visible = torch.arange(encoder.num_patches)[None, ::2].expand(2, -1)
    wanted = [2, encoder.num_prefix_tokens + visible.shape[1], encoder.embed_dim]
    try:
        with torch.no_grad():
            tokens = encoder(torch.zeros(2, channels, *image_size), visible)
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"model {name} failed on a batch of two images: {problem}") from error
    if not isinstance(tokens, torch.Tensor) or list(tokens.shape) != wanted:
        got = list(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise UserError(
            f"model {name} must return its prefix tokens and the visible patches, a tensor of "
            f"shape {wanted} here, but it returns {got}"
        )
    return {
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": getattr(encoder, "num_heads", None),
        "class_token": encoder.has_class_token,
    }

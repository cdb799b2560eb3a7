"""The options of `hpm pretrain` about the weights that a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

from hpm.core.options import option


@dataclass
class StartOptions:
    """Weights to start from."""

    init: str | None = option(None, main=True)
    """Run folder or weights file to initialise from, including published HPM, MAE, timm and Hugging
    Face ViT weights. Positions and patch projection are resampled to this run's image and patch
    size. Not for resuming."""
    init_partial: bool = False
    """Accept an --init file that lacks some of the tensors."""
    init_teacher: bool = False
    """Initialise from the teacher's (EMA) weights in the --init file."""
    pretrained: bool = False
    """Start from timm's pretrained weights; requires --model timm/NAME. Also changes the default of
    --normalize."""
    freeze_encoder: str | None = option(None, duration=True)
    """Keep the weights of the encoder as they are for this long, while new decoders learn;
    afterwards its learning rate has a warm-up of its own (default: 10% if the run starts from other
    weights and a decoder is new, else 0%)."""
    layer_decay: float | None = option(None, above=0, at_most=1)
    """Factor on the learning rate from each block of the encoder to the block below (default: 0.75
    if the run starts from other weights and a decoder is new, else 1)."""

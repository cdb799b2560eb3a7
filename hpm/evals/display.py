"""Loaded images as colours, for figures."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def as_rgb(image: Shaped[Tensor, "channels height width"]) -> Float[np.ndarray, "height width 3"]:
    """Pixels from 0 to 1. Grey is repeated; of more than three channels, the first three are shown.
    Images of more than 8 bits are stretched between their 1st and 99th percentiles."""
    values = image[:3].float() if len(image) >= 3 else image[:1].float().expand(3, -1, -1)
    low, high = torch.zeros(3), torch.full((3,), 255.0)
    if image.dtype != torch.uint8:
        ends = np.quantile(values.flatten(1).numpy(), (0.01, 0.99), axis=1)
        low, high = torch.from_numpy(ends).float()
    scaled = (values - low.view(-1, 1, 1)) / (high - low).clamp(min=1e-30).view(-1, 1, 1)
    return scaled.clamp(0, 1).permute(1, 2, 0).numpy()

"""What some options may be: names, and what they stand for."""

from __future__ import annotations

from typing import Literal

# The masks that mine, and the share of the hidden patches that are mined (the others are drawn at
# random), at first and last.
HARD_SHARES: dict[str, tuple[float, float]] = {
    "easy_to_hard": (0.0, 0.5),
    "hard_to_easy": (0.5, 0.0),
    "moderate": (0.5, 0.5),
    "hardest": (1.0, 1.0),
    "easiest": (1.0, 1.0),
    "attention": (1.0, 1.0),
}

HardShareSchedule = Literal["linear", "cosine", "constant"]

TargetName = Literal[
    "normalized_pixels", "normalized_channels", "pixels", "hog", "teacher", "frozen", "tokens"
]

RankingSignal = Literal["target", "pixels", "normalized_pixels"]

PredictorLoss = Literal["relative", "absolute", "none"]

PatchSize = tuple[int, int] | tuple[int, int, int]
Tubes = Literal["none", "mean", "max"]
Positions = Literal["sincos", "sincos_1d"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
TrackerName = Literal["none", "wandb", "mlflow"]

TIMM = "timm/"  # prefix of the names of timm's models

Flip = Literal["none", "horizontal", "vertical", "both"]

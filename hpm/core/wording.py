"""Words for what a run learns from: images, or clips of videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def sample_word(clips: bool) -> str:
    """`image` or `clip`, for `counted`."""
    return "clip" if clips else "image"


def file_word(videos: bool) -> str:
    """`image` or `video`: what samples are read from."""
    return "video" if videos else "image"


def of_clips(options: Mapping[str, Any]) -> bool:
    """Whether a run with these options learns from clips."""
    return int(options.get("frames") or 1) > 1


def worded(text: str, clips: bool) -> str:
    """A text that is written for images; of clips, with `clip` for `image`. Not for texts that
    contain paths."""
    if not clips:
        return text
    text = re.sub(r"\b([Aa])n image", r"\1 clip", text)
    return re.sub(r"\b([Ii])mage(s?)\b", lambda m: f"{'C' if m[1] == 'I' else 'c'}lip{m[2]}", text)

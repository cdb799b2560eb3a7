"""Which columns of a Hugging Face data set hold the images and their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpm.core.errors import UserError, nearest
from hpm.data.notes import say_once


@dataclass(frozen=True)
class Columns:
    """media: of images, or of videos. classes: their names, if the data set has them."""

    media: str
    holds_videos: bool = False
    label: str | None = None
    classes: tuple[str, ...] = ()


def find_columns(
    name: str, features: Mapping[str, Any] | None, image: str | None, label: str | None
) -> Columns:
    """Choose the columns.

    Args:
        name: of the data set, for messages.
        features: types of the columns.
        image, label: names that the user gave.

    Raises UserError if there is no such column, none with images, or several to choose from.
    """
    kinds = {column: _kind(column, feature) for column, feature in (features or {}).items()}
    media = _given(name, kinds, "image", image) or _media(name, kinds)
    if kinds[media] not in ("image", "video", "bytes"):
        raise UserError(
            f"{name}: the column {media} holds {kinds[media]}, not images ({_listed(kinds)})"
        )
    found = _given(name, kinds, "label", label) or _label(name, kinds)
    if label is not None and kinds[label] not in ("class", "integers", "text"):
        raise UserError(f"{name}: the column {label} holds {kinds[label]}, not labels")
    names = getattr((features or {})[found], "names", None) if found else None
    return Columns(media, kinds[media] == "video", found, tuple(names or ()))


def _kind(column: str, feature: Any) -> str:
    """What a column holds, in a word for messages."""
    if isinstance(feature, Mapping) and "bytes" in feature:  # a table without the library's types
        return "video" if column == "video" else "image"
    named = {"Image": "image", "Video": "video", "ClassLabel": "class"}
    if (kind := type(feature).__name__) in named:
        return named[kind]
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in ("binary", "large_binary", "binary_view"):
        return "bytes"
    if dtype.startswith(("int", "uint")):
        return "integers"
    return "text" if dtype in ("string", "large_string", "string_view") else dtype or kind


def _given(name: str, kinds: Mapping[str, str], key: str, column: str | None) -> str | None:
    if column is not None and column not in kinds:
        raise UserError(
            f"{name}: no column {column} for {key}{nearest(column, kinds)}; it has {_listed(kinds)}"
        )
    return column


def _media(name: str, kinds: Mapping[str, str]) -> str:
    images = [column for column, kind in kinds.items() if kind == "image"]
    videos = [column for column, kind in kinds.items() if kind == "video"]
    if not images and kinds.get("image") == "bytes":
        return "image"
    found = images or videos
    if not found:
        raise UserError(f"{name}: no column holds images; it has {_listed(kinds)}")
    if len(found) > 1 and "image" not in found:
        raise UserError(
            f"{name}: several columns hold images ({', '.join(found)}): name one, as in "
            f"hf://user/name?image={found[0]}"
        )
    return "image" if "image" in found else found[0]


def _label(name: str, kinds: Mapping[str, str]) -> str | None:
    if kinds.get("label") in ("class", "integers", "text"):
        return "label"
    classes = [column for column, kind in kinds.items() if kind == "class"]
    if len(classes) > 1:
        say_once(
            f"{name}: several columns hold classes ({', '.join(classes)}), and none is used: name "
            f"one, as in hf://user/name?label={classes[0]}"
        )
    return classes[0] if len(classes) == 1 else None


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{column} ({kind})" for column, kind in kinds.items()) or "no columns"

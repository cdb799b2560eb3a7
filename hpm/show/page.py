"""Parts shared by the HTML pages, each of which is one self-contained file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from PIL import Image

FRAME_DURATION = 150  # milliseconds of each frame of an animation


@cache
def asset(name: str) -> str:
    """A CSS or JavaScript file from `hpm/show/assets`, without its last line break."""
    return (files("hpm.show") / "assets" / name).read_text(encoding="utf-8").removesuffix("\n")


def page(title: str, body: str, script: str = "", style: str = "", fetches: bool = False) -> str:
    """A self-contained HTML document that follows the reader's light or dark theme.

    Args:
        title: plain text, escaped here.
        body: HTML, in which the caller has escaped all foreign text. CSS classes: `cards` of
            `card`, `row` (of buttons), `scroll` (around wide content), `faint`, `warning`, `map`
            (an image shown without smoothing).
        script: JavaScript, run after the body. The content security policy allows only this text
            to run, and no requests.
        style: further CSS of this page.
        fetches: allow requests to the page's own server.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        + ("; connect-src 'self'" if fetches else "")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{asset('page.css')}\n{style}</style>\n</head>\n<body>\n"
        f"{body}\n" + (f"<script>{script}</script>\n" if script else "") + "</body>\n</html>\n"
    )


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text, escaped here."""

    def cells(tag: str, words: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(word)}</{tag}>" for word in words) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f"<table><thead>{cells('th', heads)}</thead><tbody>{body}</tbody></table>"


def names_table(values: Mapping[str, Any]) -> str:
    """A table of names and values; values that are not text are written as JSON."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>'
        f"<td>{escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="names"><tbody>{rows}</tbody></table>'


def breakable(path: str) -> str:
    """A path (HTML) whose lines may break behind a slash."""
    return escape(path).replace("/", "/<wbr>")


def by_device(pointer: str, touch: str) -> str:
    """Words (HTML) for readers with a mouse, and other words for those with a touch screen."""
    return f'<span class="by-pointer">{pointer}</span><span class="by-touch">{touch}</span>'


def data_block(name: str, values: Any) -> str:
    """Values for a script: `JSON.parse(document.getElementById(name).textContent)`.

    Raises ValueError for NaN and infinity, which JSON lacks.
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def image_uri(image: np.ndarray, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """A uint8 image [H W 3] as a data URI for the `src` of an `img`; frames [T H W 3] as a looping
    animation (WebP).

    PNG may have a fourth channel (alpha). For photographs, JPEG takes a tenth of the bytes; so does
    an animation that is not lossless, as it is in place of a PNG.
    """
    file = io.BytesIO()
    if image.ndim == 4:
        first, *others = map(Image.fromarray, image)
        first.save(
            file,
            "WEBP",
            save_all=True,
            append_images=others,
            duration=FRAME_DURATION,
            loop=0,
            lossless=kind == "PNG",
            quality=80,
        )
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    Image.fromarray(image).save(file, kind, optimize=True)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def colours(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Values [H W] as uint8 [H W 3] in the colour map of the figures; bright is high.

    low, high: values of the darkest and brightest colour (default: minimum and maximum). Values
    that are not finite are grey.
    """
    from matplotlib import colormaps

    values = values.astype(np.float64)
    finite = np.isfinite(values)
    known = values[finite] if finite.any() else np.zeros(1)
    low = float(known.min()) if low is None else low
    high = float(known.max()) if high is None else high
    scaled = (np.where(finite, values, low) - low) / max(high - low, 1e-30)
    rgb = colormaps["magma"](scaled.clip(0, 1), bytes=True)[..., :3]
    return np.where(finite[..., None], rgb, np.uint8(128))

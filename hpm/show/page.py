"""What our HTML pages share: one self-contained file that opens offline, and pictures inside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from html import escape
from typing import Any, Literal

import numpy as np
from PIL import Image

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d1f23; --faint: #5c626d; --line: #dcdee3;
  --accent: #a3367a; --second: #2a6fb0; --warning: #9a5b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15161a; --card: #1d1f25; --ink: #e8e9ec; --faint: #a0a6b1; --line: #363a44;
    --accent: #f08bc6; --second: #7db8ee; --warning: #f0b860;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 4rem; max-width: 96rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1rem 0 0.25rem; }
p, ul { max-width: 70ch; margin: 0.5rem 0; }
a { color: var(--second); }
:focus-visible { outline: 2px solid var(--second); outline-offset: 2px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.9em; }
pre {
  padding: 0.75rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; overflow-x: auto; overflow-wrap: normal;
}
figure { margin: 0; }
img { display: block; max-width: 100%; }
img.map { width: 100%; height: auto; image-rendering: pixelated; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0; }
th { font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
button, select, input { font: inherit; color: inherit; accent-color: var(--accent); }
button, select {
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.3rem 0.8rem; min-height: 2.2rem; cursor: pointer;
}
button[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); }
summary { cursor: pointer; }
.faint, figcaption { color: var(--faint); font-size: 0.9rem; }
.warning { color: var(--warning); }
.scroll { overflow-x: auto; }
.row { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; margin: 0.75rem 0; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.75rem 1rem; min-width: 0; }
""".strip()  # noqa: E501


def page(title: str, body: str, script: str = "", style: str = "", fetches: bool = False) -> str:
    """One HTML document that needs nothing beside itself, light or dark as the reader has it.

    Args:
        title: plain text, escaped here.
        body: HTML; whoever writes it escapes what it takes from elsewhere (`escape`). Classes that
            the style knows: `cards` of `card`, `row` (of buttons), `scroll` (around what may be
            wider than the page), `faint`, `warning`, `map` (an image of few, sharp pixels).
        script: JavaScript, run when the body is there. Only this very text may run, and the page
            may fetch nothing: the browser is told so, should anything slip in.
        style: CSS of this page alone, after what all share.
        fetches: the page may talk to the server that it came from (and to no other).
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
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n{style}</style>\n</head>\n<body>\n"
        f"{body}\n" + (f"<script>{script}</script>\n" if script else "") + "</body>\n</html>\n"
    )


def data_block(name: str, values: Any) -> str:
    """Values for a script: `JSON.parse(document.getElementById(name).textContent)`.

    Raises ValueError on NaN and infinity, which JSON does not know.
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def image_uri(image: np.ndarray, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """A uint8 image [H W 3] as a data URI, for the `src` of an `img`.

    PNG may have a fourth channel, opacity; JPEG is a tenth of the size for photographs.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, optimize=True)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def colours(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A map of values [H W] as uint8 [H W 3] in the colours of the figures, bright is high.

    low, high: the values of the darkest and of the brightest colour (default: those of the map).
    What is not finite is grey.
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

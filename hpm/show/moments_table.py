"""A table of pictures: a row per image, a column per moment or run, and a switch of the panel.

It needs no script. All panels of a cell are there, and style sheets show one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from hpm.show.moments import Moment
from hpm.show.page import breakable, colours, image_uri
from hpm.show.scale import Scale, as_losses, bar, bar_style, scale_of

VIEWS = {
    "predicted": "predicted loss",
    "actual": "actual loss",
    "mask": "mask",
    "reconstruction": "reconstruction",
}
LOSSES = ("predicted", "actual")  # views that share a scale
SMALL = 64  # images up to this side, in pixels, are stored as PNG and shown without smoothing
MOST_WIDE = 3  # film strips: columns are at most so many times as wide as those of images

ABOUT_ACTUAL = "The actual loss is the mean over random masks."
ABOUT_SCALE = (
    "Both losses of a column share its scale. A predictor gives an order but no unit, so each "
    "predicted loss is drawn as the actual one of the same rank in the image."
)


def panels_table(
    columns: dict[str, Moment],
    row_name: str,
    runs: Sequence[int] | None = None,
    gaps: Mapping[int, int] | None = None,
) -> str:
    """The table of these columns, by title.

    runs: the number of the run that a column is of, for a script to find its cells.
    gaps: how many columns are left out after each, by its place; 0 where none are.
    """
    moments, gaps, kind = list(columns.values()), gaps or {}, row_name.split()[-1]
    views = [name for name in VIEWS if any(getattr(m, name) is not None for m in moments)]
    largest = max(moments, key=lambda moment: moment.images.shape[:2])
    marks = [""] * len(moments) if runs is None else [f' data-run="{run}"' for run in runs]
    scales = [scale_of(moment.actual) for moment in moments]
    height, width = largest.images.shape[1:3]
    heads = rows = ""
    for place, (title, scale, mark) in enumerate(zip(columns, scales, marks, strict=True)):
        shown = f"{breakable(title)}{bar(scale) if scale else ''}"
        heads += f'<th scope="col"{mark}>{shown}</th>{_gap(gaps.get(place), "th")}'
    for row in range(len(largest.images)):
        cells = "".join(
            f"<td{mark}>{_cell(moment, scale, views, row, f'{kind} {row + 1}, {title}')}</td>"
            f"{_gap(gaps.get(place), 'td')}"
            for place, ((title, moment), scale, mark) in enumerate(
                zip(columns.items(), scales, marks, strict=True)
            )
        )
        rows += (
            f'<tr><th scope="row"><div class="frame photo p{row}" role="img" '
            f'aria-label="{row_name} {row + 1}"></div></th>{cells}</tr>'
        )
    smooth = "" if max(height, width) > SMALL else " sharp"
    film = " film" if width > 1.5 * height else ""
    wide = min(max(1.0, width / height), MOST_WIDE)
    return (
        f"<style>{_style(views, largest.images)}</style>"
        f'<div class="moments{smooth}{film}" '
        f'style="--columns:{len(moments) + 1};--wide:{wide:.2f};--gaps:{len(gaps)}">'
        f"{_switch(views, moments, kind)}"
        f'<div class="scroll"><table><thead><tr><th scope="col">{kind}</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _switch(views: list[str], moments: list[Moment], kind: str) -> str:
    """Buttons that choose the panel, and one that lays the losses over the image."""
    first = next((n for n in views if all(getattr(m, n) is not None for m in moments)), views[0])
    buttons = "".join(
        f'<input type="radio" name="view" id="view-{name}"{" checked" * (name == first)}>'
        f'<label for="view-{name}">{VIEWS[name]}</label>'
        for name in views
    )
    overlay = f'<input type="checkbox" id="overlay"><label for="overlay">over the {kind}</label>'
    return buttons + overlay


def _style(views: list[str], photos: np.ndarray) -> str:
    height, width = photos.shape[1:3]
    style = [bar_style(), f".frame {{ aspect-ratio: {width} / {height}; }}"]
    style += [
        f".p{row} {{ background-image: url({_photo(photo)}); }}" for row, photo in enumerate(photos)
    ]
    for name in views:
        style.append(
            f"#view-{name}:checked ~ .scroll .{name} {{ display: block; }}"
            f"#view-{name}:focus-visible + label {{ outline: 2px solid var(--second); }}"
            f"#view-{name}:checked + label {{ border-color: var(--accent); color: var(--accent); }}"
        )
        if name not in LOSSES:
            style.append(
                f"#view-{name}:checked ~ .scroll .bar {{ visibility: hidden; }}"
                f"#view-{name}:checked ~ [for=overlay] {{ visibility: hidden; }}"
            )
    return "".join(style)


def _gap(count: int | None, tag: str) -> str:
    """A mark where columns are left out."""
    if not count:
        return ""
    title = f' title="{count} not shown"' if tag == "th" else ""
    return f'<{tag} class="gap"{title}>{"⋯" * (tag == "th")}</{tag}>'


def _cell(moment: Moment, scale: Scale | None, views: list[str], row: int, of: str) -> str:
    """All panels of one image at one moment, on top of the image; the page shows one of them."""
    if row >= len(moment.images):
        return ""
    about = escape(f"of {of}")
    shown = []
    for name in views:
        values = getattr(moment, name)
        if values is None:
            continue
        kind = "view" if name == "reconstruction" else "view map"
        shown.append(
            f'<img class="{kind} {name}" alt="{VIEWS[name]} {about}" '
            f'src="{_source(moment, scale, name, row)}">'
        )
    return f'<div class="frame photo p{row}">{"".join(shown)}</div>'


def _source(moment: Moment, scale: Scale | None, name: str, row: int) -> str:
    """A panel as a data URI."""
    values = getattr(moment, name)[row]
    if name == "reconstruction":
        return _photo(values)
    if name == "mask":  # transparent where the image is visible
        return image_uri(values[..., None] * np.array([128, 128, 128, 255], np.uint8))
    if scale is None:
        return image_uri(colours(values))
    if name == "predicted":
        flat = as_losses(values.reshape(1, -1), moment.actual[row].reshape(1, -1))
        values = flat.reshape(values.shape)
    return image_uri(colours(values, *scale))


def _photo(image: np.ndarray) -> str:
    """A data URI: PNG for small images, JPEG, which takes a tenth of the bytes, for larger ones."""
    return image_uri(image, "PNG" if max(image.shape) <= SMALL else "JPEG")

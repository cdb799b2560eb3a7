"""The page of `hpm show FEATURES`: clusters of images, and a map of all of them."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hpm.core.errors import UserError, counted
from hpm.core.files import write_text
from hpm.core.progress import track
from hpm.core.wording import sample_word, worded
from hpm.data.chain import Chain, chain
from hpm.data.fingerprint import fingerprint
from hpm.data.loader import evaluation_batches
from hpm.data.sources import Subset, open_source
from hpm.evals.embeddings import Embeddings
from hpm.show.clustering import (
    Clusters,
    agreement,
    centred_units,
    default_count,
    find_clusters,
    project,
)
from hpm.show.figures import as_rgb
from hpm.show.options import ShowConfig
from hpm.show.page import asset, by_device, data_block, image_uri, page

MOST = 5000  # images on a page
SIDE = 72  # of a thumbnail, in pixels
PER_ROW = 16  # thumbnails of a sheet
PER_SHEET = PER_ROW * PER_ROW
COLOURS = 20
BATCH = 64
LABELS_NAMED = 3
CROWDED = 1000  # images on a map beyond which points are smaller


def show_clusters(config: ShowConfig) -> Path:
    """Draw the page of features. Returns its path. Raises UserError on bad input."""
    path = Path(config.out)
    for name in ("panels", "hard_share", "mask_ratio", "num_masks"):
        if getattr(config, name) != getattr(ShowConfig, name):
            raise UserError(f"--{name.replace('_', '-')} is for a model; {config.run} has features")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {config.out}: features are shown on a page; name a .html file")
    embeddings = Embeddings.load(config.run)
    source = open_images(embeddings.about, config.data)
    units = centred_units(embeddings.features)
    clusters = find_clusters(units, config.clusters or default_count(len(units)), config.seed)
    on_page = _choose(clusters, config.images, config.seed)
    places, how = project(units[on_page], config.seed)
    sheets = _sheets(source, embeddings.ids[on_page], embeddings.about["channels"])
    write_text(path, _page(config, embeddings, clusters, on_page, places, how, sheets))
    return path


def open_images(about: dict[str, Any], data: str | None) -> Chain:
    """The images that were embedded. Raises UserError if they are not there."""
    place = data or about["data"]
    try:
        splits = open_source(place, trusted=data is not None, clips=about["clip"] is not None)
    except UserError as error:
        hint = "" if data else "; pass DATA, the place where the images are now"
        raise UserError(f"{error}{hint}") from None
    source = chain(splits)
    if [fingerprint(part) for part in source.sources] != about["fingerprint"]:
        raise UserError(f"{place}: not the images that were embedded; pass DATA, or embed again")
    return source


def _choose(clusters: Clusters, per_cluster: int, seed: int) -> np.ndarray:
    """Rows on the page: all, or those nearest to the centres and others at random."""
    images = len(clusters.numbers)
    if images <= MOST:
        return np.arange(images)
    shown = [clusters.members(number)[:per_cluster] for number in range(clusters.count)]
    kept = np.concatenate(shown)[:MOST]
    others = np.setdiff1d(np.arange(images), kept)
    some = np.random.default_rng([seed, images]).permutation(others)[: MOST - len(kept)]
    return np.sort(np.concatenate([kept, some]))


def thumbnails(source: Chain, ids: np.ndarray, channels: int) -> np.ndarray:
    """Thumbnails in the order of `ids`, uint8 [images SIDE SIDE 3]. Those that cannot be read are
    grey."""
    found = np.full((len(ids), SIDE, SIDE, 3), 128, np.uint8)
    batches = evaluation_batches(Subset(source, ids), (SIDE, SIDE), channels, BATCH)
    for batch in track(batches, "thumbnails", total=-(-len(ids) // BATCH)):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=False):
            found[index] = as_rgb(image, image)
    return found


def _sheets(source: Chain, ids: np.ndarray, channels: int) -> list[np.ndarray]:
    """Sheets of thumbnails in the order of `ids`, uint8 [H W 3] each."""
    count = -(-len(ids) // PER_SHEET)
    sheets = [np.full((PER_ROW * SIDE, PER_ROW * SIDE, 3), 128, np.uint8) for _ in range(count)]
    for index, thumbnail in enumerate(thumbnails(source, ids, channels)):
        sheet, place = divmod(index, PER_SHEET)
        top, left = (SIDE * x for x in divmod(place, PER_ROW))
        sheets[sheet][top : top + SIDE, left : left + SIDE] = thumbnail
    rows = -(-(len(ids) - (count - 1) * PER_SHEET) // PER_ROW)
    sheets[-1] = sheets[-1][: rows * SIDE]
    return sheets


def _page(
    config: ShowConfig,
    embeddings: Embeddings,
    clusters: Clusters,
    on_page: np.ndarray,
    places: np.ndarray,
    how: str,
    sheets: list[np.ndarray],
) -> str:
    labels, classes = embeddings.labels, np.zeros(0, str)
    numbers = clusters.numbers[on_page]
    colourings = {"cluster": numbers}
    if labels is not None:
        classes, colourings["label"] = np.unique(labels[on_page], return_inverse=True)
    where = {int(row): place for place, row in enumerate(on_page)}
    kind = kind_of(embeddings)
    cards = "".join(
        _card(embeddings, clusters, number, config.images, where)
        for number in range(clusters.count)
    )
    values = {
        "x": [round(1000 * float(x)) for x in places[:, 0]],
        "y": [round(1000 * float(1 - y)) for y in places[:, 1]],
        "cluster": (numbers + 1).tolist(),
        "path": [embeddings.paths[row] for row in on_page.tolist()],
        "label": None if labels is None else labels[on_page].tolist(),
        "perSheet": PER_SHEET,
        "perRow": PER_ROW,
    }
    parts = [
        _head(config, embeddings, clusters),
        "<h2>Map</h2>",
        _map(places, colourings, classes.tolist(), how, len(embeddings), of_clips(embeddings)),
        f'<h2>Clusters</h2><p class="faint">By k-means on the centred features: the {kind}s '
        f'nearest to the centre of each.</p><div class="cards">{cards}</div>',
        data_block("images", values),
    ]
    sprites = "".join(
        f".s{number} {{ background-image: url({image_uri(sheet, 'JPEG')}); }}\n"
        for number, sheet in enumerate(sheets)
    )
    palette = "".join(f".k{number} {{ --hue: {_hue(number)}; }}\n" for number in range(COLOURS))
    style = f"{asset('report.css')}\n{asset('clusters.css')}\n{palette}{sprites}"
    title = f"hpm: clusters of {embeddings.about['data']}"
    return page(title, "\n".join(parts), asset("clusters.js"), style)


def _head(config: ShowConfig, embeddings: Embeddings, clusters: Clusters) -> str:
    about = embeddings.about
    kind = kind_of(embeddings)
    numbers = [
        (f"{len(embeddings):,}", f"{kind}s"),
        (f"{clusters.count}", "cluster" if clusters.count == 1 else "clusters"),
        (f"{embeddings.features.shape[1]:,}", f"features per {kind}"),
    ]
    if embeddings.labels is not None:
        found = agreement(clusters.numbers, embeddings.labels)
        numbers.append((f"{found:.2f}", "agreement with the labels (0 is chance, 1 is the same)"))
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in numbers)
    pooled = "mean of the patches" if about["pool"] == "mean" else "class token"
    return (
        f"<h1>{escape(str(about['data']))}</h1>\n<p>Features of {escape(str(about['run']))}: "
        f"{pooled}, {kind}s of {_size(about)}.</p>\n"
        f'<p class="faint">Written by <code>hpm show {escape(config.run)} --out '
        f'{escape(config.out)}</code>.</p>\n<div class="tiles">{tiles}</div>'
    )


def of_clips(embeddings: Embeddings) -> bool:
    return embeddings.about["clip"] is not None


def kind_of(embeddings: Embeddings) -> str:
    """What was embedded: `image` or `clip`."""
    return sample_word(of_clips(embeddings))


def _size(about: dict[str, Any]) -> str:
    *frames, height, width = about["image_size"]
    return "".join(f"{count} frames of " for count in frames) + f"{height} x {width} pixels"


def _map(
    places: np.ndarray,
    colourings: dict[str, np.ndarray],
    classes: list[str],
    how: str,
    images: int,
    clips: bool,
) -> str:
    """All images as points: one path per colour, so that the page stays small."""
    shown = len(places)
    groups = []
    for name, numbers in colourings.items():
        paths = []
        for number in np.unique(numbers).tolist():
            own = places[numbers == number]
            points = "".join(f"M{1000 * x:.0f} {1000 * (1 - y):.0f}h0" for x, y in own.tolist())
            paths.append(f'<path class="k{number % COLOURS}" data-number="{number}" d="{points}"/>')
        hidden = "" if name == "cluster" else " hidden"
        groups.append(f'<g data-by="{name}"{hidden}>{"".join(paths)}</g>')
    buttons = "".join(
        f'<button type="button" data-by="{name}" aria-pressed="{str(name == "cluster").lower()}">'
        f"by {name}</button>"
        for name in colourings
    )
    some = "" if shown == images else f" {shown:,} of {images:,} images are shown."
    many = " many" if shown > CROWDED else ""
    choice = f'<div class="row">Colours {buttons}</div>' if len(colourings) > 1 else ""
    keys = "".join(
        f'<span><i class="dot k{number % COLOURS}"></i>{escape(name or "no label")}</span>'
        for number, name in enumerate(classes[:COLOURS])
    )
    article = worded("an image", clips)
    pointing = by_device(f"Point at {article}, or move with the arrow keys.", f"Touch {article}.")
    caption = worded(f"Similar images lie together. {how}.{some}", clips)
    legend = f'<div class="row legend" data-by="label" hidden>{keys}</div>' if keys else ""
    return (
        f'{choice}{legend}<figure class="card map-of-all"><div class="world{many}" tabindex="0">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="map">{"".join(groups)}<path class="here" d=""/></svg>'
        '<div class="pointed card" hidden><i class="thumb"></i><b></b><span></span></div></div>'
        f"<figcaption>{caption} {pointing}</figcaption></figure>"
    )


def _card(
    embeddings: Embeddings,
    clusters: Clusters,
    number: int,
    count: int,
    where: dict[int, int],
) -> str:
    """The images nearest to the centre of a cluster, and its most frequent labels."""
    members = clusters.members(number)
    thumbs = "".join(
        _thumb(where[row], embeddings.paths[row])
        for row in members[:count].tolist()
        if row in where
    )
    about = counted(len(members), kind_of(embeddings))
    if embeddings.labels is not None:
        common = Counter(embeddings.labels[members].tolist()).most_common(LABELS_NAMED)
        shares = ", ".join(
            f"{name or 'no label'} {100 * n / len(members):.0f}\u00a0%" for name, n in common
        )
        about += f": {shares}"
    return (
        f'<section class="card"><h3><i class="dot k{number % COLOURS}"></i>Cluster {number + 1}'
        f'</h3><p class="faint">{escape(about)}</p><div class="thumbs">{thumbs}</div>'
        f'<button type="button" class="find" data-number="{number}" aria-pressed="false" hidden>'
        "show on the map</button></section>"
    )


def _thumb(place: int, path: str) -> str:
    sheet, at = divmod(place, PER_SHEET)
    row, column = divmod(at, PER_ROW)
    name = escape(path)
    return (
        f'<i class="thumb s{sheet}" style="--x:{column};--y:{row}" role="img" title="{name}" '
        f'aria-label="{name}"></i>'
    )


def _hue(number: int) -> int:
    """Hues far apart for neighbouring numbers."""
    return round(number * 137.508) % 360

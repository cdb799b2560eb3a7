"""`hpm show`: draw panels of a model's outputs on images, as a figure or a page to browse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hpm.core.config import PretrainConfig
from hpm.core.distributed import pick_device
from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.data.loader import Batch, evaluation_batches
from hpm.data.sources import Source, Subset, open_source
from hpm.evals.embeddings import holds_features
from hpm.mining.miner import count_hidden, tubes_of
from hpm.show.clusters import show_clusters
from hpm.show.drawing import draw
from hpm.show.figures import TITLES, picture, unavailable_panels
from hpm.show.gallery import write_gallery
from hpm.show.options import PANELS, Panel, ShowConfig
from hpm.show.strips import as_strips
from hpm.weights.resolve import Trained, load

FIGURES = (".png", ".pdf", ".svg", ".jpg")
PAGES = (".html", ".htm")
MAX_IMAGES = {FIGURES: 100, PAGES: 2000}  # figures are drawn in memory, pages are one file
IMAGES_OF_A_CLIP = 10  # a clip takes as much of a file as so many images
BATCH_SIZE = 64
# Which patches masks mine, if not the hardest.
MINED = {"easiest": "the easiest", "attention": "those with the most attention"}
MAX_NAMED = 3  # unreadable images that are named


def show(config: ShowConfig) -> Path:
    """Draw some images of the data, or the clusters of features. Returns the path of the file.
    Raises UserError on bad input."""
    if holds_features(Path(config.run).expanduser()):
        return show_clusters(config)
    path = Path(config.out)
    _check(config, path)
    trained = open_trained(config.run, config.device)
    check_shares(trained, config.hard_share, config.mask_ratio)
    reasons = unavailable_panels(trained)
    panels = choose_panels(config, reasons)
    share = hard_share(config.hard_share, trained)
    if trained.sampling() is not None:
        check_count(config, path, clips=True)
    batch, names = read_images(config, trained)
    shown = picture(
        trained,
        batch.images,
        batch.indices,
        share,
        config.num_masks,
        config.seed,
        config.mask_ratio,
        panels,
        progress=True,
    )
    title = f"{config.run} on {config.data}"
    if path.suffix.lower() in PAGES:
        about = [describe_mask(trained.config, config, share)] if trained.config else []
        if config.panels is None and reasons:
            about.append(describe_unavailable(reasons))
        write_gallery(shown, path, title, names, about)
    else:
        draw(as_strips(shown), path, title)
    return path


def open_trained(run: str, device: str) -> Trained:
    """Load weights in eval mode on the device, and print notes about them."""
    trained = load(run)
    for note in trained.notes:
        print(note)
    prepare(trained, device)
    return trained


def prepare(trained: Trained, device: str) -> None:
    """Move models to the device, in eval mode."""
    for module in (trained.encoder, trained.model, trained.teacher):
        if module is not None:
            module.to(pick_device(device)).eval()


def some_images(data: str, count: int, seed: int, trained: Trained, trusted: bool = True) -> Subset:
    """Random images of the test split, if there is one, or of all; videos for a model of clips.

    trusted: whether the user named the data. Raises UserError if there are none.
    """
    splits = open_source(data, trusted, clips=trained.sampling() is not None)
    source: Source = splits.test_or_all
    order = np.random.default_rng([seed, len(source)]).permutation(len(source))
    return Subset(source, np.sort(order[:count]))


def evaluation_images(some: Subset, trained: Trained, batch_size: int) -> Iterator[Batch]:
    """These images, as the encoder takes them."""
    height, width = trained.encoder.image_size[-2:]
    channels = trained.encoder.channels
    return evaluation_batches(
        some, (height, width), channels, batch_size, sampling=trained.sampling()
    )


def describe_unavailable(reasons: dict[Panel, str]) -> str:
    """One line that lists the unavailable panels and why."""
    by_reason: dict[str, list[str]] = {}
    for panel in PANELS:
        if panel in reasons:
            by_reason.setdefault(reasons[panel], []).append(TITLES[panel])
    return "not shown: " + "; ".join(
        f"{', '.join(panels)} ({reason})" for reason, panels in by_reason.items()
    )


def mines(trained: Trained) -> bool:
    """Whether the weights can choose hard patches."""
    config, teacher = trained.config, trained.teacher
    if config is None or teacher is None:
        return False
    return config.mask == "attention" or teacher.predictor is not None or config.mines_by_memory


def hard_share(requested: float | None, trained: Trained) -> float:
    """The requested share, by default that at the end of training; 0 without mining."""
    if requested is not None and not mines(trained):
        raise UserError(f"hard_share: {trained.name} has no loss predictor: leave it out")
    if requested is not None:
        return requested
    return trained.config.hard_shares[1] if trained.config and mines(trained) else 0.0


def check_shares(trained: Trained, share: float | None, mask_ratio: float | None) -> None:
    """Raise UserError if no mask can be drawn with these shares."""
    if share is not None and not 0 <= share <= 1:
        raise UserError(f"hard_share is {share:g}; it must lie between 0 and 1")
    if mask_ratio is None:
        return
    if trained.model is None or trained.config is None:
        raise UserError(f"mask_ratio: {trained.name} holds a backbone only: leave it out")
    if not 0 < mask_ratio < 1:
        raise UserError(f"mask_ratio is {mask_ratio:g}; it must lie between 0 and 1")
    patches = trained.encoder.num_patches
    if count_hidden(trained.model, mask_ratio, tubes_of(trained.config)) == patches:
        raise UserError(f"mask_ratio {mask_ratio:g} leaves no visible patch of {patches}: lower it")


def mined_patches(trained_with: PretrainConfig) -> str:
    """Which patches the mask of a run mines."""
    return MINED.get(trained_with.mask, "the hardest")


def describe_mask(trained_with: PretrainConfig, config: ShowConfig, share: float) -> str:
    ratio = trained_with.mask_ratio if config.mask_ratio is None else config.mask_ratio
    mined = f", {100 * share:g} % of these {mined_patches(trained_with)}" if share else ""
    return (
        f"mask {trained_with.mask}: {100 * ratio:g} % of the patches hidden{mined}; actual loss: "
        f"the mean over {config.num_masks} random masks; seed {config.seed}"
    )


def _check(config: ShowConfig, path: Path) -> None:
    if config.data is None:
        raise UserError("DATA must be given: images to show (see hpm show --help)")
    if config.clusters is not None:
        raise UserError(f"--clusters is for features of hpm embed, which {config.run} has not")
    if config.images < 1 or config.num_masks < 1:
        raise UserError("images and num_masks must be at least 1")
    if path.suffix.lower() not in FIGURES + PAGES:
        raise UserError(f"out is '{config.out}': name a .png, .pdf, .svg, .jpg or .html file")
    check_count(config, path)
    if config.panels is not None and not config.panels:
        raise UserError(f"panels is empty: name some of {', '.join(PANELS)}")


def check_count(config: ShowConfig, path: Path, clips: bool = False) -> None:
    """Raise UserError for more images, or clips, than the file holds."""
    on_page = path.suffix.lower() in PAGES
    limit, what = MAX_IMAGES[PAGES if on_page else FIGURES], ""
    if clips:
        limit, what = limit // IMAGES_OF_A_CLIP, " clips"
    if config.images > limit:
        more = "show fewer" if on_page else "a page (--out show.html) holds more"
        raise UserError(
            f"images is {config.images}, but a {path.suffix} file holds at most {limit}{what}: "
            f"{more}"
        )


def choose_panels(config: ShowConfig, reasons: dict[Panel, str]) -> tuple[Panel, ...]:
    """The requested panels, by default all that are available. Raises UserError for others."""
    available = tuple(panel for panel in PANELS if panel not in reasons)
    if config.panels is None:
        if reasons:
            print(describe_unavailable(reasons))
        return available
    for panel in config.panels:
        if panel in reasons:
            raise UserError(
                f"panels: {config.run} cannot show {panel}: {reasons[panel]}; available: "
                f"{', '.join(available)}"
            )
    return config.panels


def read_images(config: ShowConfig, trained: Trained) -> tuple[Batch, list[str]]:
    """Read random images of the data and their paths. Prints those that cannot be read."""
    assert config.data is not None
    some = some_images(config.data, config.images, config.seed, trained)
    reading = evaluation_images(some, trained, BATCH_SIZE)
    batches = list(track(reading, "reading", -(-len(some) // BATCH_SIZE)))
    problems = [f"{some.path(i)}: {what}" for b in batches for i, what in b.unreadable]
    batches = [batch for batch in batches if len(batch.images)]
    if not batches:
        raise UserError(f"{some.name}: no image of {len(some)} can be read ({problems[0]})")
    for problem in problems[:MAX_NAMED]:
        print(f"passed over: {problem}")
    if len(problems) > MAX_NAMED:
        print(f"passed over: {len(problems) - MAX_NAMED} more")
    indices = torch.cat([batch.indices for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    return Batch(images, indices, []), [some.path(int(index)) for index in indices]

"""`hpm show`: the figure of hard patches of a run, for images of the user's choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpm.config import ShowConfig
from hpm.data.loader import evaluation_batches
from hpm.data.sources import Subset, open_source
from hpm.distributed import pick_device
from hpm.errors import UserError
from hpm.figures import draw, picture
from hpm.run import load


def show(config: ShowConfig) -> Path:
    """Draw some images of the data. Returns the figure's path; UserError on bad input."""
    if config.images < 1 or config.num_masks < 1:
        raise UserError("images and num_masks must be at least 1")
    if config.hard_share is not None and not 0 <= config.hard_share <= 1:
        raise UserError(f"hard_share is {config.hard_share}; it must lie between 0 and 1")
    path = Path(config.out)
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise UserError(f"out is '{config.out}': name a .png, .pdf, .svg or .jpg file")
    trained = load(config.run)
    for note in trained.notes:
        print(note)
    if trained.model is None or trained.teacher is None or trained.config is None:
        raise UserError(
            f"{config.run} holds a backbone only: without decoders it has no losses and no "
            "reconstruction to show; name the run folder or a checkpoint"
        )
    device = pick_device(config.device)
    trained.model.to(device).eval()
    trained.teacher.to(device).eval()
    splits = open_source(config.data)
    source = splits.test or splits.train
    rng = np.random.default_rng([config.seed, len(source)])
    some = Subset(source, np.sort(rng.permutation(len(source))[: config.images]))
    height, width = trained.model.encoder.image_size
    share = trained.config.hard_shares[1] if config.hard_share is None else config.hard_share
    (batch,) = evaluation_batches(some, (height, width), trained.config.channels, config.images)
    if not len(batch.images):
        raise UserError(f"{source.name}: none of the {len(some)} images can be read")
    shown = picture(trained, batch.images, batch.indices, share, config.num_masks, config.seed)
    draw(shown, path, f"{config.run} on {config.data}")
    return path

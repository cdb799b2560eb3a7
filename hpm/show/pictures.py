"""Panels of images that a caller names or holds, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hpm.core.errors import UserError, one_line
from hpm.core.options import make_config
from hpm.data.arrays import UnreadableImage, at_depth, is_deep
from hpm.data.loader import Batch
from hpm.data.transforms import evaluation_view
from hpm.show.command import (
    check_count,
    check_shares,
    choose_panels,
    hard_share,
    open_trained,
    read_images,
)
from hpm.show.figures import Picture, picture, unavailable_panels
from hpm.show.options import Panel, ShowConfig
from hpm.show.strips import as_strips
from hpm.weights.backbone import opened
from hpm.weights.resolve import Trained

OnePicture = str | Path | Image.Image | np.ndarray
Pictures = OnePicture | Sequence[OnePicture]


def picture_of(
    run: str | Path,
    images: Pictures,
    panels: Sequence[Panel] | None,
    count: int,
    options: dict[str, Any],
) -> Picture:
    """The panels of images, clips as film strips. See `Run.show`."""
    named = isinstance(images, (str, Path))
    given = {"run": run, "data": images if named else None, "images": count} | options
    if panels is not None:
        given["panels"] = tuple(panels)
    config = make_config(ShowConfig, given)
    trained = open_trained(config.run, config.device)
    check_count(config, Path(config.out), clips=trained.sampling() is not None)
    check_shares(trained, config.hard_share, config.mask_ratio)
    batch = read_images(config, trained)[0] if named else _batch(images, trained)
    shown = picture(
        trained,
        batch.images,
        batch.indices,
        hard_share(config.hard_share, trained),
        config.num_masks,
        config.seed,
        config.mask_ratio,
        choose_panels(config, unavailable_panels(trained)),
    )
    return as_strips(shown)


def _batch(images: Any, trained: Trained) -> Batch:
    """Pictures as the encoder takes them."""
    if trained.sampling() is not None:
        raise UserError("this run takes clips: name a folder of videos")
    several = images if isinstance(images, (list, tuple)) else [images]
    size, channels = trained.encoder.image_size[-2:], trained.encoder.channels
    views = []
    for number, each in enumerate(several):
        name = str(each) if isinstance(each, (str, Path)) else f"picture {number}"
        try:
            image = opened(each)
            view = evaluation_view(image, (size[0], size[1]), channels)
            views.append(torch.from_numpy(at_depth(view, is_deep(image)).copy()))
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{name} cannot be used: {one_line(error)}") from None
    if not views:
        raise UserError("there are no pictures to show")
    return Batch(torch.stack(views), torch.arange(len(views)), [])

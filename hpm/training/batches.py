"""The training views of a run, and the batches of its images."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.data import DataLoader

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.data.cache import Cache, make_cache
from hpm.data.loader import StepSampler, TrainingViews, training_loader, training_views
from hpm.data.sources import Source
from hpm.data.video.clips import ClipViews
from hpm.data.video.sampling import clip_sampling
from hpm.data.workers import num_workers
from hpm.models.architecture import Architecture


def make_views(
    config: PretrainConfig, architecture: Architecture, source: Source
) -> TrainingViews | ClipViews:
    """Random views of the training images, of the architecture's size."""
    height, width = architecture.image_size[-2:]
    return training_views(
        source,
        (height, width),
        config.channels,
        config.seed,
        config.crop_scale,
        config.flip,
        min(architecture.patch_size[-2:]),
        clip_sampling(config),
    )


def image_cache(config: PretrainConfig, architecture: Architecture, source: Source) -> Cache | None:
    """A cache of decoded images as --cache says; None for videos, or if memory is short."""
    views = make_views(config, architecture, source)
    if not isinstance(views, TrainingViews):
        return None
    return make_cache(config.cache, source, partial(views.decoded, source))


def read_images(
    config: PretrainConfig,
    source: Source,
    views: TrainingViews | ClipViews,
    steps: tuple[int, int],
    device: torch.device,
) -> DataLoader:
    """This process's part of each batch, from the first of `steps` up to the last."""
    first, total = steps
    sampler = StepSampler(
        len(source),
        config.global_batch_size,
        total,
        config.seed,
        first,
        distributed.rank(),
        distributed.world_size(),
        config.repeat_augment,
    )
    return training_loader(
        source, views, sampler, num_workers(config.workers), device.type == "cuda"
    )

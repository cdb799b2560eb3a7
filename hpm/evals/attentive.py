"""Attentive probe of frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpm.core.options import option
from hpm.evals.contract import Measured
from hpm.evals.options import ClassificationOptions, FrozenEvalOptions

if TYPE_CHECKING:
    from hpm.evals.task import Task


@dataclass
class Options(FrozenEvalOptions, ClassificationOptions):
    """Attentive probe on frozen features: one learned query pools the patches."""

    lr: tuple[float, ...] = option((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), above=0)
    """Learning rates to try."""
    weight_decay: tuple[float, ...] = option((0.05,), at_least=0)
    """Weight decays to try."""
    epochs: int = option(40, at_least=1)
    """Number of passes over the training images."""
    probe_batch_size: int = option(256, at_least=2)
    """Images per optimiser step, at most a sixteenth of the training set or 32."""
    heads_gb: float = option(8.0, above=0, may_change=True, changes_numbers=False)
    """Maximum memory in GB for the probe's heads. If those of all learning rates and weight decays
    need more, as with many classes, they are trained in several passes over the features."""
    cache_gb: float = option(8.0, above=0)
    """Maximum memory in GB for cached patch features. If they need more, they are recomputed in
    every epoch."""


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield a row for the patches of each backbone and of raw pixels."""
    import torch

    from hpm.evals.attentive_heads import AttentiveHeads
    from hpm.evals.features import by_view, extract, patches
    from hpm.evals.probing import Computed, Probed, Recipe, grid, probe, rows

    data = task.labelled(options.train_share)
    recipe = Recipe(
        AttentiveHeads,
        grid(options.lr, options.weight_decay),
        options.epochs,
        options.probe_batch_size,
        options.seed,
        task.device,
        options.heads_gb,
    )
    found: dict[str, Probed] = {}
    task.about |= {"train_images": len(data.train), "test_images": len(data.test)}
    sides = task.sides(data)
    views = len(data.train) + task.test_reader.grid.count * len(data.test)
    for alike, baseline in by_view(task.backbones, options.baselines):
        size, channels = alike[0].view
        embed = patches(alike, baseline)
        one = embed(torch.zeros(1, channels, *task.reader.shape(size), dtype=torch.uint8))
        values = sum(features[0].numel() for features in one.values())
        if 4 * values * views <= options.cache_gb * 1e9:
            train, test = (
                extract(embed, source, labels, size, channels, reader)
                for source, labels, reader in sides
            )
            found |= task.probe_cached(data, train, test, recipe)
        else:
            train_bank, test_bank = (
                Computed(source, labels, size, channels, embed, reader, task.unreadable(source))
                for source, labels, reader in sides
            )
            held = task.held_out(data)
            found |= probe(train_bank, train_bank, test_bank, held, len(data.classes), recipe)
    yield from rows(found)

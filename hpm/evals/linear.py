"""Linear probe of frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpm.core.choices import Flip
from hpm.core.options import option
from hpm.evals.contract import Measured
from hpm.evals.options import ClassificationOptions, FrozenEvalOptions

if TYPE_CHECKING:
    from hpm.evals.features import Labelled
    from hpm.evals.probing import Probed, Recipe
    from hpm.evals.task import Task


@dataclass
class Options(FrozenEvalOptions, ClassificationOptions):
    """Linear probe on frozen features; the hyperparameters are chosen on a held-out part of the
    training set."""

    augment: bool = option(False, main=True)
    """Train on random crops and flips, drawn anew in every epoch (as MAE does), instead of on
    features computed once."""
    lr: tuple[float, ...] = option((1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), above=0)
    """Learning rates to try, per 256 images in a batch."""
    weight_decay: tuple[float, ...] = option((0.0, 1e-2, 1e-1), at_least=0)
    """Weight decays to try."""
    epochs: int = option(90, at_least=1)
    """Number of passes over the training features."""
    probe_batch_size: int = option(1024, at_least=2)
    """Features per optimiser step, at most a sixteenth of the training set or 32."""
    heads_gb: float = option(8.0, above=0, may_change=True, changes_numbers=False)
    """Maximum memory in GB for the probe's heads. If those of all learning rates and weight decays
    need more, as with many classes, they are trained in several passes over the features."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), above=0, at_most=1, rising=True)
    """Smallest and largest area of a random crop with --augment, as a fraction of the image."""
    flip: bool | Flip = True
    """Flip at random with --augment (see pretrain); none where direction has a meaning."""


def run(task: Task, options: Options) -> Iterator[Measured]:
    """Yield a row for each kind of pooled features."""
    from hpm.evals.probing import rows

    data = task.labelled(options.train_share)
    if options.augment:
        yield from rows(_probe_augmented(task, options, data))
    else:
        yield from rows(task.probe_cached(data, *task.pooled(data), recipe(task, options)))


def recipe(task: Task, options: Options) -> Recipe:
    """The training recipe of the linear heads."""
    from hpm.evals.linear_heads import LinearHeads
    from hpm.evals.probing import Recipe, grid

    return Recipe(
        LinearHeads,
        grid(options.lr, options.weight_decay),
        options.epochs,
        options.probe_batch_size,
        options.seed,
        task.device,
        options.heads_gb,
    )


def _probe_augmented(task: Task, options: Options, data: Labelled) -> dict[str, Probed]:
    """Probe with new random views in each epoch."""
    from hpm.data.loader import training_views
    from hpm.evals.features import by_view, pooled
    from hpm.evals.probing import Computed, probe

    found: dict[str, Probed] = {}
    held = task.held_out(data)
    task.about |= {"train_images": len(data.train), "test_images": len(data.test)}
    for alike, baseline in by_view(task.backbones, options.baselines):
        size, channels = alike[0].view
        embed = pooled(alike, baseline)
        augmented = training_views(
            data.train,
            size,
            channels,
            options.seed,
            options.crop_scale,
            options.flip,
            1,
            task.reader.sampling,
        )
        in_train, in_test = task.unreadable(data.train), task.unreadable(data.test)
        train = data.train, data.train_labels, size, channels, embed, task.reader, in_train
        test = data.test, data.test_labels, size, channels, embed, task.test_reader, in_test
        found |= probe(
            Computed(*train, augmented, stand_in=True),
            Computed(*train),
            Computed(*test),
            held,
            len(data.classes),
            recipe(task, options),
        )
    return found

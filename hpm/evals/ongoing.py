"""A probe of the features during pre-training: small and fast kNN and linear probes.

Only the training split of the labelled images is used, of which a fifth is for testing. The test
split remains unseen, so that the checkpoint that this probe selects can be tested on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hpm.core import distributed
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError, counted
from hpm.data.sources import Source, Splits, Subset, open_source
from hpm.evals.classes import by_class
from hpm.evals.features import (
    EvaluatedBackbone,
    Features,
    ImageReader,
    labelled_splits,
    pooled_features,
    split_by_class,
)
from hpm.evals.linear_heads import LinearHeads
from hpm.evals.metrics import TrueClassRanks
from hpm.evals.neighbours import nearest_neighbours
from hpm.evals.options import EvalOptions
from hpm.evals.probing import Cached, Recipe, grid, probe
from hpm.weights.resolve import Trained

MAX_IMAGES = 20_000
OF_CLASS = 3  # images, at least: to learn from, to choose hyper-parameters on, and to test on
NAME, POOLED = "trained", "trained, patch mean"
K = 20
LEARNING_RATES, EPOCHS, BATCH_SIZE, HEADS_GB = (0.01, 0.1, 1.0), 30, 1024, 2.0


class OngoingProbe:
    """The probe on the labelled images of `--probe`. Raises UserError if they cannot be used.

    Args:
        data: the labelled images.
        seed: of the splits and of the linear probe.
        workers: number of data loading workers; None for one per spare core.
        max_unreadable: share of the images of each split that may be unreadable.
    """

    def __init__(self, data: str, seed: int, workers: int | None, max_unreadable: float = 1.0):
        splits = open_source(data)
        # Without a test split, `hpm eval` holds out a fifth, which must not be used here either.
        whole = splits.train if splits.test else labelled_splits(splits, EvalOptions.seed).train
        self.data = labelled_splits(Splits(_some(whole, seed)), seed)
        count = len(self.data.train)
        if count < K:
            raise UserError(
                f"probe: {whole.name} leaves {counted(count, 'image')} to learn from; it takes {K}"
            )
        self.seed, self.workers, self.max_unreadable = seed, workers, max_unreadable

    def measure(
        self, trained: Trained, device: torch.device, report: Callable[[str], None]
    ) -> dict[str, float]:
        """Top-1 accuracy (%) of `knn` and `linear` on the patch mean. Reports unreadable images;
        raises UserError if there are too many."""
        data = self.data
        reader = ImageReader(128, self.workers, report, max_unreadable=self.max_unreadable)
        backbone = trained.backbone().to(device).eval()
        backbones = [EvaluatedBackbone(NAME, backbone, trained.architecture)]
        train, test = (
            pooled_features(backbones, source, labels, reader, False)
            for source, labels in ((data.train, data.train_labels), (data.test, data.test_labels))
        )
        return distributed.main_first(lambda: self._judged(train[POOLED], test[POOLED], device))

    def _judged(self, train: Features, test: Features, device: torch.device) -> dict[str, float]:
        data, classes = self.data, len(self.data.classes)
        k = min(K, len(train.labels))  # some images may be unreadable
        ((_, nearest),) = nearest_neighbours(train, test, classes, (k,), device=device)
        bank = Cached({POOLED: train})
        held = split_by_class(bank.labels.numpy(), data.classes, data.train.name, self.seed)[1]
        points = grid(LEARNING_RATES, (0.0,))
        recipe = Recipe(LinearHeads, points, EPOCHS, BATCH_SIZE, self.seed, device, HEADS_GB)
        probed = probe(bank, bank, Cached({POOLED: test}), held, classes, recipe)[POOLED]
        return {"knn": _top1(nearest), "linear": _top1(probed.ranks)}


def make_probe(config: PretrainConfig) -> OngoingProbe | None:
    """The probe of a pre-training, or None if --probe is not set."""
    if not config.probe:
        return None
    return OngoingProbe(config.probe, config.seed, config.workers, config.max_unreadable)


def _some(source: Source, seed: int) -> Source:
    """A random subset of at most MAX_IMAGES images, OF_CLASS or more of each class. Raises
    UserError if there are no such."""
    if source.labels is None:
        return source  # `labelled_splits` says so
    rng = np.random.default_rng([seed, len(source), 2])
    order = rng.permutation(len(source))
    classes = list(by_class(source.labels[order]))
    for label, ids in classes:
        if len(ids) < OF_CLASS:
            raise UserError(
                f"probe: {source.name} leaves {counted(len(ids), 'image')} of class "
                f"'{source.classes[label]}', and each class takes {OF_CLASS}: to learn from, to "
                "choose hyper-parameters on and to test on; add images of it, or leave the class "
                "out"
            )
    if OF_CLASS * len(classes) > MAX_IMAGES:
        raise UserError(
            f"probe: {source.name} has {len(classes):,} classes, and {OF_CLASS} images of each are "
            f"more than {MAX_IMAGES:,}, which a probe takes at most: name images of fewer classes"
        )
    if len(source) <= MAX_IMAGES:
        return source
    first = np.zeros(len(source), dtype=bool)
    first[np.concatenate([ids[:OF_CLASS] for _, ids in classes])] = True
    chosen = np.concatenate([order[first], order[~first]])[:MAX_IMAGES]
    return Subset(source, np.sort(chosen))


def _top1(ranked: TrueClassRanks) -> float:
    return 100 * (ranked.ranks == 0).double().mean().item()

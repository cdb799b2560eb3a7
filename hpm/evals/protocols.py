"""Each evaluation, from backbones and data to numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hpm.core import distributed
from hpm.core.errors import UserError, counted
from hpm.data.loader import EvaluationViews, TrainingViews, num_workers
from hpm.data.sources import Source, Splits, Subset, open_source
from hpm.data.unreadable import UnreadableImages
from hpm.evals.features import (
    RAW_PIXELS,
    Embed,
    Features,
    Labelled,
    Reading,
    Subject,
    by_view,
    extract,
    labelled_splits,
    pooled,
    pooled_features,
    raw_pixels,
    split_by_class,
)
from hpm.evals.files import COMPARED
from hpm.evals.finetune import check_finetune, finetune
from hpm.evals.hardness import measure
from hpm.evals.knn import knn
from hpm.evals.metrics import Ranked
from hpm.evals.options import (
    AttentiveConfig,
    EvalConfig,
    FinetuneConfig,
    FrozenConfig,
    HardnessConfig,
    KnnConfig,
    LabelledEvalConfig,
    LinearConfig,
    StatsConfig,
)
from hpm.evals.probe import (
    AttentiveHeads,
    Cached,
    Computed,
    LinearHeads,
    Probed,
    Recipe,
    grid,
    probe,
)
from hpm.evals.stats import stats
from hpm.models.build import build_encoder
from hpm.models.patches import patchify
from hpm.weights.resolve import Backbone, Trained, load

TRAINED, RANDOM = "trained", "random weights"


@dataclass
class Outcome:
    """Where the true class of each test image stands, by features and setting; or numbers."""

    ranked: dict[str, dict[str, Ranked]] = field(default_factory=dict)
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)
    hardness: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)


class Task:
    """What an evaluation works on: backbones, images, device."""

    def __init__(self, config: EvalConfig, device: torch.device, reading: Reading):
        self.config, self.device, self.reading = config, device, reading
        self.classes = 0  # of the labels, once they are asked for
        self.trained = load(config.run)
        self.subjects = [self._subject(TRAINED, self.trained)]
        if config.compare:
            self.subjects.append(self._subject(COMPARED, load(config.compare)))
        if config.baselines:
            random = build_encoder(self.trained.architecture, config.seed)
            backbone = Backbone(random, self.trained.mean, self.trained.std)
            architecture = self.trained.architecture
            self.subjects.append(Subject(RANDOM, backbone, architecture, self.precision))
        for subject in self.subjects:
            subject.backbone.to(device).eval()
        self.splits = open_source(config.data)
        if config.test:
            self.splits = Splits(self.splits.train, open_source(config.test).train)

    def _subject(self, name: str, trained: Trained) -> Subject:
        backbone = trained.backbone(teacher=self.config.teacher)
        for note in trained.notes:
            self.reading.report(note)
        return Subject(name, backbone, trained.architecture, self.precision)

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """Of frozen features."""
        return self.config.precision if isinstance(self.config, FrozenConfig) else "float32"

    def labelled(self) -> Labelled:
        assert isinstance(self.config, LabelledEvalConfig)
        data = labelled_splits(self.splits, self.config.seed, self.config.train_share)
        self.classes = len(data.classes)
        return data

    def held(self, labels: np.ndarray, data: Labelled) -> np.ndarray:
        """Ids of the training images that choose the hyper-parameters: a fifth of each class."""
        return split_by_class(labels, data.classes, data.train.name, self.config.seed)[1]

    def unreadable(self, source: Source) -> UnreadableImages:
        return UnreadableImages(source, self.reading.max_unreadable)

    def some_images(self, count: int) -> Source:
        """At most `count` images of the test split (or else of all)."""
        source = self.splits.test or self.splits.train
        if len(source) <= count:
            return source
        rng = np.random.default_rng([self.config.seed, len(source)])
        return Subset(source, np.sort(rng.permutation(len(source))[:count]))

    @property
    def workers(self) -> int:
        return num_workers(self.config.workers)


def evaluate_knn(task: Task, config: KnnConfig) -> Outcome:
    data = task.labelled()
    train, test = (
        pooled_features(task.subjects, source, labels, task.reading, config.baselines)
        for source, labels in (
            (data.train, data.train_labels), (data.test, data.test_labels),
        )
    )  # fmt: skip

    def classified() -> Outcome:
        count = len(next(iter(train.values())).labels)
        if count < min(config.k):
            raise UserError(
                f"k {min(config.k)} is more than {counted(count, 'training image')}: pass a "
                "smaller --k"
            )
        ranked = {
            name: dict(
                knn(train[name], test[name], len(data.classes), config.k, config.temperature,
                    task.device)
            )
            for name in train
        }  # fmt: skip
        return Outcome(ranked, images=_counts(train, test))

    outcome = distributed.main_first(classified)
    outcome.hardness = evaluate_hardness(task, 256)
    return outcome


def evaluate_linear(task: Task, config: LinearConfig) -> Outcome:
    data = task.labelled()
    recipe = _recipe(LinearHeads, config, task.device)
    if not config.augment:
        train, test = (
            pooled_features(task.subjects, source, labels, task.reading, config.baselines)
            for source, labels in (
                (data.train, data.train_labels), (data.test, data.test_labels),
            )
        )  # fmt: skip
        return distributed.main_first(
            lambda: _probe_outcome(
                "linear", _probe_cached(task, data, train, test, recipe), _counts(train, test)
            )
        )
    found: dict[str, Probed] = {}
    held = task.held(data.train_labels, data)
    for alike, baseline in by_view(task.subjects, config.baselines):
        size, channels = alike[0].view
        embed = pooled(alike, baseline)
        views = TrainingViews(size, channels, config.seed, config.crop_scale, True, 1)
        still = EvaluationViews(size, channels, crop_share=config.crop_share)
        in_train, in_test = task.unreadable(data.train), task.unreadable(data.test)
        labelled, report = (data.train, data.train_labels), task.reading.report
        found |= probe(
            Computed(*labelled, views, embed, task.workers, in_train, report, stand_in=True),
            Computed(*labelled, still, embed, task.workers, in_train, report),
            Computed(
                data.test, data.test_labels, still, embed, task.workers, in_test, report
            ),
            held, len(data.classes), recipe,
        )  # fmt: skip
    images = {"train_images": len(data.train), "test_images": len(data.test)}
    return _probe_outcome("linear", found, images)


def evaluate_attentive(task: Task, config: AttentiveConfig) -> Outcome:
    data = task.labelled()
    recipe = _recipe(AttentiveHeads, config, task.device)
    found: dict[str, Probed] = {}
    images = {"train_images": len(data.train), "test_images": len(data.test)}
    for alike, baseline in by_view(task.subjects, config.baselines):
        size, channels = alike[0].view
        embed = _patches(alike, baseline)
        values = sum(
            f[0].numel() for f in embed(torch.zeros(1, channels, *size, dtype=torch.uint8)).values()
        )
        sides = ((data.train, data.train_labels), (data.test, data.test_labels))
        if 4 * values * (len(data.train) + len(data.test)) <= config.cache_gb * 1e9:
            one, two = (extract(embed, *side, size, channels, task.reading) for side in sides)
            found |= distributed.main_first(partial(_probe_cached, task, data, one, two, recipe))
            images = distributed.main_first(partial(_counts, one, two))
        else:
            still = EvaluationViews(size, channels, crop_share=config.crop_share)
            train, test = (
                Computed(
                    *side, still, embed, task.workers, task.unreadable(side[0]),
                    task.reading.report,
                )
                for side in sides
            )  # fmt: skip
            held = task.held(data.train_labels, data)
            found |= probe(train, train, test, held, len(data.classes), recipe)
    return _probe_outcome("attentive", found, images)


def _probe_cached(
    task: Task, data: Labelled, train: dict[str, Features], test: dict[str, Features],
    recipe: Recipe,
) -> dict[str, Probed]:  # fmt: skip
    """A probe on features that the main process holds: of no use in another one."""
    bank = Cached(train)
    held = task.held(bank.labels.numpy(), data)
    return probe(bank, bank, Cached(test), held, len(data.classes), recipe)


def evaluate_finetune(task: Task, config: FinetuneConfig, folder: Path | None) -> Outcome:
    if folder is None:
        raise UserError(f"{config.run} is no run folder: pass --out FOLDER for the fine-tuning")
    for subject in task.subjects:
        check_finetune(config, subject.architecture)
    data = task.labelled()
    if config.baselines:
        task.held(data.train_labels, data)  # refused now or never
    ranked = {}
    for subject in task.subjects:
        weights = subject.backbone.encoder.state_dict() if subject.name != RANDOM else None
        below = folder / subject.name.replace(" ", "_")
        ranked[subject.name] = {
            "finetune": finetune(config, subject, weights, data, below, task.reading)
        }
    images = {"train_images": len(data.train)}
    images["test_images"] = len(next(iter(ranked.values()))["finetune"].labels)
    outcome = Outcome(ranked, images=images)
    if config.baselines:
        size, channels = task.subjects[0].view
        train, test = (
            extract(lambda x: {RAW_PIXELS: raw_pixels(x)}, source, labels, size, channels,
                    task.reading)
            for source, labels in ((data.train, data.train_labels), (data.test, data.test_labels))
        )  # fmt: skip
        linear = LinearConfig(config.run, config.data, seed=config.seed)
        recipe = _recipe(LinearHeads, linear, task.device)
        found = distributed.main_first(lambda: _probe_cached(task, data, train, test, recipe))
        name = f"{RAW_PIXELS} (linear)"
        outcome.ranked[name] = {"finetune": found[RAW_PIXELS].ranked}
        outcome.chosen = {name: _setting(found[RAW_PIXELS])}
    return outcome


def evaluate_stats(task: Task, config: StatsConfig) -> Outcome:
    source = task.some_images(config.images)
    values = stats(task.subjects, source, task.reading, config.baselines)
    return Outcome(
        values={name: {"stats": numbers} for name, numbers in values.items()},
        hardness=evaluate_hardness(task, 256),
        images={"images": len(source)},
    )


def evaluate_hardness(task: Task, count: int) -> dict[str, float]:
    """Of the trained model's predictor and teacher; nothing where there is no predictor."""
    trained = task.trained
    if trained.model is None or trained.teacher is None or trained.model.predictor is None:
        return {}

    def measure_them() -> dict[str, float]:
        assert trained.model is not None and trained.teacher is not None
        trained.model.to(task.device).eval()
        trained.teacher.to(task.device).eval()
        images, config = task.some_images(count), task.config
        return measure(trained, images, task.device, config.seed, crop_share=config.crop_share)

    try:
        return distributed.main_first(measure_them)
    except UserError as error:
        # A frozen model or a codebook may be missing here: no reason to lose all other numbers.
        if isinstance(task.config, HardnessConfig):
            raise
        task.reading.report(f"the predictor is not measured: {error}")
        return {}


def run_protocol(task: Task, folder: Path | None) -> Outcome:
    """The evaluation that the task's config is of."""
    config = task.config
    if isinstance(config, KnnConfig):
        return evaluate_knn(task, config)
    if isinstance(config, LinearConfig):
        return evaluate_linear(task, config)
    if isinstance(config, AttentiveConfig):
        return evaluate_attentive(task, config)
    if isinstance(config, FinetuneConfig):
        return evaluate_finetune(task, config, folder)
    if isinstance(config, StatsConfig):
        return evaluate_stats(task, config)
    assert isinstance(config, HardnessConfig)
    hardness = evaluate_hardness(task, config.images)
    if task.trained.model is None:
        raise UserError(
            f"{config.run} holds a backbone only: without decoders it has no losses to measure"
        )
    if not hardness:
        raise UserError(f"{config.run} has no loss predictor, so there is nothing to measure")
    return Outcome(hardness=hardness)


def _recipe(
    heads: type[LinearHeads] | type[AttentiveHeads],
    config: LinearConfig | AttentiveConfig,
    device: torch.device,
) -> Recipe:
    settings = grid(config.lr, config.weight_decay)
    return Recipe(heads, settings, config.epochs, config.probe_batch_size, config.seed, device)


def _patches(subjects: list[Subject], baseline: bool) -> Embed:
    """Patches of every backbone, and (as a baseline) their raw pixels: [B N *]."""

    @torch.inference_mode()
    def embed(images: Tensor) -> dict[str, Tensor]:
        features = {s.name: s.parts(images)[1] for s in subjects}
        if baseline:
            patch_size = subjects[0].architecture.patch_size
            features[RAW_PIXELS] = patchify(images.float() / 255, patch_size)
        return features

    return embed


def _probe_outcome(protocol: str, found: dict[str, Probed], images: dict[str, int]) -> Outcome:
    if RAW_PIXELS in found:
        found[RAW_PIXELS] = found.pop(RAW_PIXELS)  # to the end of the table
    return Outcome(
        ranked={name: {protocol: probed.ranked} for name, probed in found.items()},
        chosen={name: _setting(probed) for name, probed in found.items()},
        images=images,
    )


def _setting(probed: Probed) -> dict[str, Any]:
    return dataclasses.asdict(probed.setting) | {"held_out_top1": probed.held_out_top1}


def _counts(train: dict[str, Features], test: dict[str, Features]) -> dict[str, int]:
    return {
        "train_images": len(next(iter(train.values())).labels),
        "test_images": len(next(iter(test.values())).labels),
    }

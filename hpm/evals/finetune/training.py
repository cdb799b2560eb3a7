"""Fine-tuning: the whole encoder trained with labels (the recipe of DeiT and MAE, appendix A.1)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hpm.core import distributed, lock
from hpm.core.config import pair
from hpm.core.durations import duration_steps
from hpm.core.errors import UserError, counted
from hpm.core.extras import need
from hpm.core.files import remove_stale, write_tensors
from hpm.core.progress import say
from hpm.core.signals import Interrupted, stop_signals
from hpm.data.loader import (
    Key,
    MakeView,
    StepSampler,
    TrainingViews,
    normalize,
    num_workers,
    training_loader,
)
from hpm.data.sources import Source
from hpm.data.transforms import View, augmented_view
from hpm.data.unreadable import UnreadableImages
from hpm.evals.features import EvaluatedBackbone, ImageReader, Labelled
from hpm.evals.finetune import Options
from hpm.evals.metrics import TrueClassRanks, rank
from hpm.models.build import build_classifier, check_image_size
from hpm.models.classifier import Classifier
from hpm.training.log import RunLog
from hpm.training.optim import layer_decay_groups, learning_rate
from hpm.training.schedule import long_warmup
from hpm.weights.checkpoint import list_checkpoints, load_checkpoint, restore, save_checkpoint

LOG_EVERY = 10
# How a fine-tuning is run, not what it learns: may differ when it goes on.
FREE = {
    "run", "compare", "baselines", "out", "workers", "device", "checkpoint_every", "test", "data",
    "teacher", "crop_share", "max_unreadable",
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneViews:
    """Random crop, flip and RandAugment by timm, the same for the same (seed, epoch, index)."""

    size: tuple[int, int]
    channels: int
    seed: int
    transform: Callable[[Image.Image], Any]

    def __call__(self, source: Source, key: Key) -> tuple[View, None]:
        seed_everything(self.seed, *key)
        return augmented_view(source.open(key[1]), self.channels, self.transform), None


def seed_everything(*key: int) -> None:
    """Seed all generators that timm draws from."""
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002
    torch.manual_seed(words[2])


class Augmentation:
    """What is done to images and labels, as timm has it, and the loss that goes with it."""

    def __init__(
        self, config: Options, subject: EvaluatedBackbone, size: tuple[int, int], num_classes: int
    ):
        self.mean = subject.backbone.mean
        data = need("timm.data", "finetune", "fine-tuning")
        erasing = need("timm.data.random_erasing", "finetune", "fine-tuning")
        self.config, self.num_classes = config, num_classes
        self.channels = subject.architecture["channels"]
        self.views: MakeView
        if config.rand_augment == "none":
            self.views = TrainingViews(
                size, self.channels, config.seed, config.crop_scale, config.flip, 1
            )
        else:
            self.views = FinetuneViews(size, self.channels, config.seed, self._transform(size))
        self.erase = None
        if config.random_erase > 0:
            device = str(self.mean.device)
            self.erase = erasing.RandomErasing(config.random_erase, mode="pixel", device=device)
        self.mix = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mix = data.Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )  # fmt: skip

    def _transform(self, size: tuple[int, int]) -> Callable[[Image.Image], Any]:
        """Crop, flip and RandAugment."""
        config, mean = self.config, self.mean
        factory = need("timm.data.transforms_factory", "finetune", "fine-tuning")
        colours = mean.expand(3) if self.channels == 1 else mean
        try:
            transform = factory.transforms_imagenet_train(
                size,
                scale=config.crop_scale,
                hflip=0.5 if config.flip in (True, "horizontal", "both") else 0.0,
                vflip=0.5 if config.flip in ("vertical", "both") else 0.0,
                color_jitter=None,
                auto_augment=config.rand_augment,
                interpolation="bicubic",
                mean=tuple(colours.tolist()),  # what is moved out of the image is filled with
                normalize=False,
            )
        except (AssertionError, KeyError, ValueError):
            raise UserError(
                f"rand_augment is '{config.rand_augment}', which timm cannot read: write it as "
                "rand-m9-mstd0.5-inc1, or none"
            ) from None
        # The last transform turns the image into a tensor; ours are turned where all others are.
        transform.transforms.pop()
        return transform

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, autocast: Callable[[], Any]
    ) -> Tensor:
        """Cross-entropy of a batch of normalised images, erased and mixed."""
        smoothing = self.config.label_smoothing
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
            smoothing = 0.0  # it is in the mixed labels already
        with autocast():
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def check_finetune(config: Options, architecture: dict[str, Any]) -> None:
    """Raises UserError for the first option that cannot work."""
    size = pair(config.image_size) if config.image_size else tuple(architecture["image_size"])
    check_image_size(size, architecture["patch_size"])
    if config.rand_augment != "none" and architecture["channels"] not in (1, 3):
        raise UserError(
            f"rand_augment knows grey and RGB, but this backbone has "
            f"{counted(architecture['channels'], 'channel')}: pass --rand-augment none"
        )
    if config.pool == "cls" and not architecture.get("class_token", True):
        raise UserError(f"pool cls: {architecture['model']} has no class token, pass --pool mean")
    for name in ("epochs", "batch_size", "accumulate"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("label_smoothing", "drop_path", "random_erase"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")
    for name in ("mixup", "cutmix", "base_lr", "min_lr", "weight_decay", "clip_grad"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"{name} is {value}; it must not be negative")
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"layer_decay is {config.layer_decay}; it must lie between 0 and 1")
    duration_steps(config.warmup, 100, 10)
    duration_steps(config.checkpoint_every, 100, 10)


def finetune(
    config: Options, subject: EvaluatedBackbone, weights: dict[str, Tensor] | None, data: Labelled,
    folder: Path, reading: ImageReader,
) -> TrueClassRanks:  # fmt: skip
    """Train a classifier from these encoder weights (random ones for None), then test it.

    Saves itself into `folder`, and goes on from there. The test images are looked at once, after
    the last step.
    """
    check_finetune(config, subject.architecture)
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        return _Finetuning(config, subject, weights, data, folder).run(reading)
    finally:
        lock.release(folder)
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        torch.set_rng_state(generators[2])


class _Finetuning:
    """What a fine-tuning is made of, at the step where it stands."""

    def __init__(
        self, config: Options, subject: EvaluatedBackbone, weights: dict[str, Tensor] | None,
        data: Labelled, folder: Path,
    ):  # fmt: skip
        architecture, num_classes = subject.architecture, len(data.classes)
        height, width = pair(config.image_size or tuple(architecture["image_size"]))
        self.config, self.subject, self.data, self.folder = config, subject, data, folder
        self.size = (height, width)
        if config.rand_augment != "none" and data.train.is_deep():
            raise UserError(
                f"rand_augment knows 8 bits, but {data.train.name} has images of more: "
                "pass --rand-augment none"
            )
        self.device = subject.backbone.mean.device
        self.world_size = distributed.world_size()
        # An even number for each part of each process: mixup pairs images.
        share = 2 * self.world_size * config.accumulate
        self.batch_size = min(config.batch_size, len(data.train)) // share * share
        if not self.batch_size:
            raise UserError(
                f"{counted(min(config.batch_size, len(data.train)), 'image')} cannot be a batch of "
                f"{counted(self.world_size, 'process', 'processes')}, accumulate "
                f"{config.accumulate}: {share} or more can"
            )
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.total = config.epochs * self.steps_per_epoch
        self.augmentation = Augmentation(config, subject, self.size, num_classes)
        self.model: Classifier = build_classifier(
            architecture,
            weights,
            num_classes,
            config.pool,
            self.size,
            config.drop_path,
            config.seed,
        ).to(self.device)
        groups = layer_decay_groups(
            self.model, config.base_lr, config.layer_decay, config.weight_decay
        )
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True)
        self.unreadable = UnreadableImages(data.train, config.max_unreadable)
        self.step = 0
        self.fingerprint = _fingerprint(self.model)
        self._resume()

    @property
    def _file(self) -> Path:
        """The trained classifier."""
        return self.folder / "classifier.safetensors"

    def run(self, reading: ImageReader) -> TrueClassRanks:
        """All steps that are left, then the test."""
        if self.step < self.total:
            self._train()
        if not distributed.from_main(self._file.exists()):
            backbone = self.subject.backbone
            about = {
                "kind": "hpm classifier",
                "architecture": self.subject.architecture | {"image_size": list(self.size)},
                "pool": self.config.pool,
                "classes": self.data.classes,
                "mean": backbone.mean.tolist(),
                "std": backbone.std.tolist(),
            }
            state = self.model.state_dict()
            distributed.main_first(lambda: write_tensors(self._file, state, about))
        return self._test(reading)

    def _train(self) -> None:
        config = self.config
        log = RunLog(self.folder, self.step, self.total, distributed.is_main())
        log.info(
            f"fine-tuning {self.subject.name}: {counted(len(self.data.train), 'image')} of "
            f"{counted(len(self.data.classes), 'class', 'classes')}, "
            f"{counted(self.total, 'step')} of {self.batch_size}, "
            f"from step {self.step}, into {self.folder}"
        )
        peak = config.base_lr * self.batch_size / 256
        warmup = duration_steps(config.warmup, self.total, self.steps_per_epoch)
        for line in long_warmup(config.warmup, warmup, self.total):
            log.info(line)
        save_every = max(
            1, round(duration_steps(config.checkpoint_every, self.total, self.steps_per_epoch))
        )
        parallel = distributed.data_parallel(self.model.train())
        mean, std = self.subject.backbone.mean, self.subject.backbone.std
        labels = torch.from_numpy(np.asarray(self.data.train_labels, dtype=np.int64))
        losses: list[Tensor] = []
        try:
            with stop_signals() as stop:
                for batch in self._batches():
                    seed_everything(config.seed, self.step, distributed.rank(), 1)
                    rate = learning_rate(self.step, self.total, warmup, peak, config.min_lr)
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate * group["lr_scale"]
                    parts = zip(
                        batch.images.chunk(config.accumulate),
                        batch.indices.chunk(config.accumulate), strict=True,
                    )  # fmt: skip
                    for number, (images, indices) in enumerate(parts, 1):
                        images = normalize(images.to(self.device), mean, std)
                        expected = labels[indices].to(self.device)
                        last = number == config.accumulate
                        with distributed.no_gradient_sync(parallel, last):
                            loss = self.augmentation.loss(
                                parallel, images, expected, self._autocast
                            )
                            (loss / config.accumulate).backward()
                        losses.append(loss.detach())
                    if config.clip_grad is not None:
                        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.step += 1
                    done = self.step == self.total
                    stopping = stop.received > 0 and self.world_size == 1
                    saving = self.step % save_every == 0 or done or stopping
                    if saving or self.step % LOG_EVERY == 0:
                        self._read(log, losses, rate)
                        self.unreadable.check(log.info)
                        stopping = distributed.any_process(stop.received > 0, self.device)
                    if saving or stopping:
                        self._save()
                    if stopping and not done:
                        raise Interrupted(stop.received)
        finally:
            log.close()

    def _batches(self) -> Any:
        config = self.config
        sampler = StepSampler(
            len(self.data.train), self.batch_size, self.total, config.seed, self.step,
            distributed.rank(), self.world_size,
        )  # fmt: skip
        workers = num_workers(config.workers)
        pinned = self.device.type == "cuda"
        for batch in training_loader(
            self.data.train, self.augmentation.views, sampler, workers, pinned
        ):
            if len(batch.images) * self.world_size < self.batch_size:
                raise UserError(f"{self.data.train.name}: no readable image")
            self.unreadable.add(batch.unreadable)
            yield batch

    def _autocast(self) -> torch.autocast:
        on_gpu = self.device.type == "cuda"
        enabled = self.config.precision == "bfloat16" or (
            self.config.precision == "auto" and on_gpu
        )
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _read(self, log: RunLog, losses: list[Tensor], rate: float) -> None:
        loss = float(distributed.mean(torch.stack(losses).mean()))
        losses.clear()
        if not np.isfinite(loss):
            raise UserError(
                f"the loss is not finite at step {self.step}: lower --base-lr, or pass "
                "--precision float32, in another --out"
            )
        log.metrics(self.step, {"loss": loss, "learning_rate": rate})
        log.progress(self.step, f"loss {loss:.4f}")

    @torch.inference_mode()
    def _test(self, reading: ImageReader) -> TrueClassRanks:
        self.model.eval()
        mean, std = self.subject.backbone.mean, self.subject.backbone.std
        labels = torch.from_numpy(np.asarray(self.data.test_labels, dtype=np.int64))
        ids, parts = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        channels = self.subject.architecture["channels"]
        for batch in reading.batches(self.data.test, self.size, channels):
            with self._autocast():
                logits = self.model(normalize(batch.images.to(self.device), mean, std))
            ids.append(batch.indices)
            parts.append(rank(logits.float().cpu(), labels[batch.indices]).ranks)
        everyones = distributed.rows_of_all(torch.cat(ids))
        if not len(everyones):
            raise UserError(f"{self.data.test.name}: no readable image")
        order = everyones.argsort()
        ranks = distributed.rows_of_all(torch.cat(parts))
        return TrueClassRanks(ranks[order], labels[everyones[order]])

    def _save(self) -> None:
        meta = {
            "step": self.step,
            "identity": self._identity(),
            "unreadable": self.unreadable.problems,
        }
        distributed.main_first(
            lambda: save_checkpoint(
                self.folder / "checkpoints", self.model, None, self.optimizer, meta, keep=1
            )
        )

    def _resume(self) -> None:
        if note := distributed.main_first(self._claim):
            say(note)
        checkpoints = self.folder / "checkpoints"
        distributed.main_first(lambda: remove_stale(self.folder, checkpoints))
        found = distributed.from_main(list_checkpoints(checkpoints))
        if not found:
            return
        checkpoint = load_checkpoint(found[-1])
        before, now = checkpoint.meta.get("identity", {}), self._identity()
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.folder} holds another fine-tuning: there {name} is {before.get(name)}, "
                f"here {now[name]}; choose another --out"
            )
        restore(checkpoint, self.model, None, self.optimizer)
        self.step = checkpoint.meta["step"]
        known = {int(index): text for index, text in checkpoint.meta.get("unreadable", {}).items()}
        self.unreadable = UnreadableImages(self.data.train, self.config.max_unreadable, known)

    def _claim(self) -> str | None:
        """Keep others from training here as well (see `hpm.core.lock`)."""
        return None if self._file.exists() else lock.acquire(self.folder)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a fine-tuning to go on."""
        options = dataclasses.asdict(self.config)
        kept = {name: value for name, value in options.items() if name not in FREE}
        kept |= {"images": len(self.data.train), "classes": self.data.classes}
        kept |= {"images_per_step": self.batch_size}
        return json.loads(json.dumps(kept | {"weights": self.fingerprint}))


def _fingerprint(model: nn.Module) -> str:
    """The same for the same weights, on every machine."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

"""`hpm bench segment` and `hpm bench detect`: speed of training and testing with a dense head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from hpm.commands.multiply_adds import count_multiply_adds
from hpm.commands.options import BenchDenseConfig, BenchDetectConfig, BenchSegmentConfig
from hpm.commands.timing import (
    about_device,
    machine,
    matrix_product_flops,
    print_table,
    speed,
    speed_rows,
    wait,
)
from hpm.core.config import PretrainConfig
from hpm.core.distributed import pick_device
from hpm.core.options import check_rules
from hpm.core.phases import PhaseClock, phase
from hpm.core.progress import track
from hpm.core.random_state import random_state_kept
from hpm.data.detection import Objects
from hpm.data.loader import normalize
from hpm.models.architecture import resolve_model
from hpm.models.build import resized_encoder
from hpm.models.segmenter import UPerNetSegmenter, segmentation_loss
from hpm.training.log import memory_gb
from hpm.training.loop import autocast, optimizer_step
from hpm.training.optim import layer_decay_groups
from hpm.training.sync_norm import batch_norm
from hpm.weights.detection import DetectionModel, DetectorShape
from hpm.weights.segmentation import SegmentationModel

PHASES = ("forward", "backward", "optimiser")
HEADS = {"segment": "UPerNet", "detect": "Mask R-CNN"}
GREY = 0.5  # mean and standard deviation of the channels of noise


class DenseBench:
    """A model with a dense head, its optimiser, and a batch of noise on the device.

    A subclass builds `trained`, the module whose parameters are trained, and defines `loss` and
    `test`.
    """

    trained: nn.Module

    def __init__(self, config: BenchDenseConfig, device: torch.device):
        self.config, self.device = config, device
        size = (config.batch_size, config.input_channels, config.image_size, config.image_size)
        self.images = torch.randint(0, 256, size, dtype=torch.uint8)
        self.grey = [GREY] * config.input_channels
        pretraining = PretrainConfig(
            "demo",
            "",
            model=config.model,
            image_size=config.image_size,
            patch_size=config.patch_size,
            channels=config.input_channels,
        )
        self.architecture = resolve_model(pretraining).encoder()
        side = (config.image_size, config.image_size)
        self.encoder = resized_encoder(self.architecture, None, side, drop_path=0.1)

    def loss(self) -> Tensor:
        """The loss of the batch, with the graph of its backward pass."""
        raise NotImplementedError

    def test(self) -> None:
        """Predict for each image, to the pixels of its file."""
        raise NotImplementedError

    def optimise(self, model: nn.Module) -> None:
        """Train this model with AdamW."""
        self.trained = model.to(self.device)
        groups = layer_decay_groups(model, 1e-4, 0.7, 0.1)
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def train_step(self) -> None:
        """One optimiser step, at a learning rate of 0: on noise, the weights would diverge."""
        with phase("forward"), autocast(self.device, self.config.precision):
            loss = self.loss()
        with phase("backward"):
            loss.backward()
        optimizer_step(self.trained, self.optimizer, learning_rate=0.0)


class SegmentBench(DenseBench):
    """UPerNet. A test image is one window."""

    config: BenchSegmentConfig

    def __init__(self, config: BenchSegmentConfig, device: torch.device):
        super().__init__(config, device)
        segmenter = UPerNetSegmenter(
            self.encoder, config.classes, config.channels, norm_layer=batch_norm(device)
        )
        self.optimise(segmenter)
        self.targets = torch.randint(
            0, config.classes, (len(self.images), *self.images.shape[2:]), device=device
        )
        names = [str(number) for number in range(config.classes)]
        side = config.image_size
        self.model = SegmentationModel(
            segmenter, self.architecture, names, self.grey, self.grey, side
        ).to(device)

    def loss(self) -> Tensor:
        pixels = normalize(self.images.to(self.device), self.model.mean, self.model.std)
        logits, auxiliary = self.trained(pixels)
        return segmentation_loss(logits, auxiliary, self.targets)

    def test(self) -> None:
        for image in self.images:
            with autocast(self.device, self.config.precision):
                self.model.labels(image, (image.shape[1], image.shape[2]))


class DetectBench(DenseBench):
    """Mask R-CNN. With a threshold of 0, untrained heads find as many objects as there can be."""

    config: BenchDetectConfig

    def __init__(self, config: BenchDetectConfig, device: torch.device):
        super().__init__(config, device)
        shape = DetectorShape(
            self.architecture,
            [str(number) for number in range(config.classes)],
            self.grey,
            self.grey,
            masks=True,
            window_size=config.window_size,
            channels=config.channels,
            anchor_scale=8.0,
            proposals=config.proposals,
            score_threshold=0.0,
        )
        self.model = DetectionModel(shape, self.encoder, config.box_batch_size)
        self.optimise(self.model)
        self.objects = [self._some_objects().to(device) for _ in self.images]

    def loss(self) -> Tensor:
        pixels = [self.model.normalize(image) for image in self.images]
        return torch.stack(list(self.trained(pixels, self.objects).values())).sum()

    def test(self) -> None:
        sizes = [(image.shape[1], image.shape[2]) for image in self.images]
        with autocast(self.device, self.config.precision):
            self.model.detect(list(self.images), sizes)

    def _some_objects(self) -> Objects:
        """Rectangles of a quarter of the side."""
        side, count = self.config.image_size, self.config.objects
        length = max(1, side // 4)
        corners = torch.randint(0, side - length + 1, (count, 2))
        masks = torch.zeros(count, side, side, dtype=torch.bool)
        for mask, (x, y) in zip(masks, corners.tolist(), strict=True):
            mask[y : y + length, x : x + length] = True
        return Objects(
            torch.cat([corners, corners + length], 1).float(),
            torch.randint(0, self.config.classes, (count,)),
            masks,
            torch.zeros(count, dtype=torch.bool),
        )


def bench_dense(config: BenchSegmentConfig | BenchDetectConfig) -> dict[str, Any]:
    """Time steps of training and of testing in turns. Raises UserError on bad input."""
    check_rules(config)
    device = pick_device(config.device)
    with random_state_kept(device):
        torch.manual_seed(config.seed)  # the GPU's generator too: it draws proposals
        if isinstance(config, BenchDetectConfig):
            return _measured("detect", DetectBench(config, device))
        return _measured("segment", SegmentBench(config, device))


def _measured(head: str, bench: DenseBench) -> dict[str, Any]:
    config, device = bench.config, bench.device
    runs: dict[str, Callable[[], None]] = {"training": bench.train_step, "testing": bench.test}
    counts: dict[str, float] = {}
    for name, run in runs.items():  # counts, and warms up
        bench.trained.train(name == "training")
        total, _ = count_multiply_adds(run)
        counts[name] = total / config.batch_size
    if device.type == "cuda":  # counting computes attention in another way, of more memory
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    phases: dict[str, list[float]] = {name: [] for name in PHASES}
    products = []
    for _ in track(range(config.repeats), "rounds"):
        for name, run in runs.items():
            bench.trained.train(name == "training")
            run()  # not timed: the caches hold the other's data
            for _ in range(config.steps_each):
                wait(device)
                start = time.perf_counter()
                run()
                wait(device)
                seconds[name].append(time.perf_counter() - start)
        bench.trained.train()
        with PhaseClock(device) as clock:
            bench.train_step()
        for name in PHASES:
            phases[name].append(clock.seconds[name])
        products.append(matrix_product_flops(device))
    about = about_device(device, statistics.median(products))
    found = {name: speed(seconds[name], config.batch_size, counts[name], about) for name in runs}
    return {
        **about,
        "model": config.model,
        "head": head,
        "architecture": bench.architecture.to_json(),
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "phases_ms": {name: 1e3 * statistics.median(phases[name]) for name in PHASES},
        "memory_gb": memory_gb(device),
        "measured": found,
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the numbers as a table."""
    size = report["image_size"]
    console.print(
        f"{report['model']}, {HEADS[report['head']]}, {size} x {size} px, batch "
        f"{report['batch_size']}, {report['precision']}, on {machine(report)}; peak memory "
        f"{report['memory_gb']:.2f} GB",
        highlight=False,
        soft_wrap=True,
    )
    rate, step, *others = speed_rows(list(report["measured"].values()), report["peak_tflops"])
    phases = [[f"  {name}, ms", f"{ms:.1f}", ""] for name, ms in report["phases_ms"].items()]
    print_table(console, list(report["measured"]), (rate, step, *phases, *others))

"""`hpm bench data`: how fast images are loaded, and what limits it.

Compares the loader with 1, 2, ... workers to the bare libraries in one process (decoding, cropping
and resizing of files in memory), alternately over several rounds.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hpm.commands.bench_clips import BareClips
from hpm.commands.options import BenchDataConfig
from hpm.commands.timing import print_table
from hpm.core.config import pair
from hpm.core.errors import UserError, counted
from hpm.core.progress import track
from hpm.data.arrays import UnreadableImage, resize
from hpm.data.jpeg import COLOURS, START, reduction, simplejpeg
from hpm.data.loader import Key, TrainingViews, training_loader, training_views
from hpm.data.opening import open_image
from hpm.data.sources import Source, open_source
from hpm.data.transforms import decode, least_size, random_crop
from hpm.data.video.clips import ClipViews
from hpm.data.video.sampling import ClipSampling
from hpm.data.video.sources import holds_videos
from hpm.data.video.torchcodec import decoding_device
from hpm.data.workers import usable_cores

GOAL = 0.9  # share of the bare libraries' speed that a worker should reach
BARE_IMAGES = 100  # on which the bare libraries are timed


def bench_data(config: BenchDataConfig) -> dict[str, Any]:
    """Measure images per second of the bare libraries and of 1, 2, ... workers.

    Raises UserError on bad input.
    """
    for name in ("images", "batch_size", "repeats", "channels"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1")
    max_workers = usable_cores() if config.workers is None else config.workers
    if max_workers < 1 or (config.images_per_second is not None and config.images_per_second <= 0):
        raise UserError("workers must be at least 1, and images_per_second above 0")
    clips = config.frames > 1
    source = open_source(config.data, clips=clips).train
    sampling = ClipSampling(config.frames, config.frame_stride) if clips else None
    size = pair(config.image_size)
    views = training_views(source, size, config.channels, 0, config.crop_scale, True, 1, sampling)
    bare = _Bare(source, views)
    rates: dict[int, list[float]] = {workers: [] for workers in range(1, max_workers + 1)}
    memory: dict[int, float | None] = {}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in track(range(config.repeats), "rounds"):
            bare.run()
            for workers, found in rates.items():
                rate, memory[workers] = _loader_rate(source, views, config, workers)
                found.append(rate)
    finally:
        torch.set_num_threads(torch_threads)
    return _report(config, source, bare, rates, memory)


class _Bare:
    """Times the bare libraries: seconds per image of each phase, by round."""

    def __init__(self, source: Source, views: TrainingViews | ClipViews):
        self.source, self.views = source, views
        self.clips = BareClips(source, views) if isinstance(views, ClipViews) else None
        self.phases: dict[str, list[float]] = {"read": [], "decode": [], "resize": []}
        drawn = np.random.default_rng(0).permutation(len(source))[:BARE_IMAGES]
        self.indices = [int(index) for index in drawn if self._readable(int(index))]
        if not self.indices:
            raise UserError(f"{source.name}: no image of {len(drawn)} can be read")

    def run(self) -> None:
        rng, least = np.random.default_rng(1), least_size(self.views.size, self.views.crop_scale[0])
        seconds = dict.fromkeys(self.phases, 0.0)
        for index in self.indices:
            start = time.perf_counter()
            data = self.source.read(index)
            read = time.perf_counter()
            pixels = self._decode(index, data, least)
            decoded = time.perf_counter()
            left, top, right, bottom = random_crop(
                rng, pixels.shape[-1], pixels.shape[-2], self.views.crop_scale
            )
            part = pixels[..., top:bottom, left:right]
            if self.clips:
                self.clips.resize(part)
            else:
                resize(part if part.dtype == np.uint8 else part.astype(np.float32), self.views.size)
            seconds["read"] += read - start
            seconds["decode"] += decoded - read
            seconds["resize"] += time.perf_counter() - decoded
        for phase, total in seconds.items():
            self.phases[phase].append(total / len(self.indices))

    def _decode(self, index: int, data: bytes | None, least: tuple[int, int]) -> np.ndarray:
        """Decode to [C H W]: JPEG by calling the decoder directly, all else like the loader; clips
        to [T C H W]."""
        if self.clips:
            return self.clips.decode(index, data)
        channels = self.views.channels
        if simplejpeg and data and data.startswith(START) and channels in COLOURS:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours not in ("CMYK", "YCCK"):
                scale = reduction((width, height), least)
                pixels: np.ndarray = simplejpeg.decode_jpeg(
                    data,
                    COLOURS[channels],
                    min_width=-(-width // scale),
                    min_height=-(-height // scale),
                    min_factor=scale,
                )
                return pixels.transpose(2, 0, 1)
        image = self.source.open(index) if data is None else open_image(io.BytesIO(data))
        return decode(image, channels, least).array

    def _readable(self, index: int) -> bool:
        try:
            self.views(self.source, (0, index))
            if self.clips:
                self.clips.plan(index)
        except (UnreadableImage, OSError):
            return False
        return True


def _loader_rate(
    source: Source, views: TrainingViews | ClipViews, config: BenchDataConfig, workers: int
) -> tuple[float, float | None]:
    """(images per second after a warm-up, memory per worker in MB)."""
    warm_up = 2 * workers
    batches = max(4 * workers, math.ceil(config.images / config.batch_size))
    loader = training_loader(
        source, views, _steps(len(source), config.batch_size, warm_up + batches), workers, False
    )
    iterator, start, memory = iter(loader), 0.0, None
    for number in range(warm_up + batches):
        batch = next(iterator)
        if len(batch.images) < config.batch_size:
            raise UserError(f"{source.name}: no readable image ({batch.unreadable[0][1]})")
        if number + 1 == warm_up:
            start = time.perf_counter()
        if number + 1 == warm_up + batches // 2:
            memory = _memory([worker.pid for worker in getattr(iterator, "_workers", [])])
    return batches * config.batch_size / (time.perf_counter() - start), memory


def _steps(count: int, batch_size: int, steps: int) -> Iterator[list[Key]]:
    """Random batches in which all images occur equally often."""
    order: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(order) < batch_size:
            order += np.random.default_rng(epoch).permutation(count).tolist()
            epoch += 1
        yield [(epoch, index) for index in order[:batch_size]]
        order = order[batch_size:]


def _memory(pids: list[int]) -> float | None:
    """Mean proportional set size in MB (shared pages are divided among processes), or None."""
    sizes = []
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        sizes += [int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")]
    return statistics.mean(sizes) if sizes else None


def _report(
    config: BenchDataConfig,
    source: Source,
    bare: _Bare,
    rates: dict[int, list[float]],
    memory: dict[int, float | None],
) -> dict[str, Any]:
    """Collect all numbers."""
    phases = {name: statistics.median(seconds) for name, seconds in bare.phases.items()}
    rounds = list(zip(bare.phases["decode"], bare.phases["resize"], strict=True))
    bare_rates = [1 / (decoding + resizing) for decoding, resizing in rounds]
    rate = statistics.median(bare_rates)
    workers = {
        number: {
            "images_per_second": statistics.median(found),
            "best": max(found),
            # Ratios within a round, so that other load on the machine affects both sides.
            "share_of_bare": statistics.median(
                r / (b * number) for r, b in zip(found, bare_rates, strict=True)
            ),
            "memory_mb": memory[number],
        }
        for number, found in rates.items()
    }
    report: dict[str, Any] = {
        "data": source.name,
        "images": len(source),
        "image_size": list(pair(config.image_size)),
        "batch_size": config.batch_size,
        "cores": usable_cores(),
        "frames": config.frames,
        "decoder": _decoder(source),
        "bare": {
            "images_per_second": rate,
            "best": max(bare_rates),
            "ms": {name: 1e3 * seconds for name, seconds in phases.items()},
        },
        "workers": workers,
        "limit": _limit(phases, workers, usable_cores(), config.frames > 1),
    }
    if config.images_per_second is not None:
        report["wanted"] = config.images_per_second
        each = workers[1]["images_per_second"] or 0.0
        report["workers_needed"] = math.ceil(config.images_per_second / each)
    return report


def _decoder(source: Source) -> str:
    if holds_videos(source):
        return "videos by PyAV" if decoding_device() is None else "videos by TorchCodec"
    return "JPEG by simplejpeg" if simplejpeg else "JPEG by Pillow"


def _limit(
    phases: dict[str, float], workers: dict[int, dict[str, Any]], cores: int, clips: bool = False
) -> str:
    """The bottleneck, in one line."""
    work = phases["decode"] + phases["resize"]
    if phases["read"] > work:
        smaller = "smaller files" if clips else "hpm prepare"
        return f"reading: files come slower than they are decoded (a faster disk, or {smaller})"
    one = workers[1]["share_of_bare"]
    if one < 0.8 * GOAL:
        return (
            f"copying: a worker reaches {100 * one:.0f} % of the bare libraries (smaller batches, "
            "or a machine less busy)"
        )
    largest = max(workers)
    if largest >= cores or workers[largest]["share_of_bare"] < 0.8 * one:
        remedy = (
            "smaller videos with more key frames, --repeat-augment decodes a clip once for several "
            "views"
            if clips
            else "hpm prepare makes images smaller, --repeat-augment decodes them once for several "
            "views, --cache not again"
        )
        return f"the number of cores ({cores}): all of them decode ({remedy})"
    part = "decoding" if phases["decode"] > phases["resize"] else "resizing"
    return f"{part}: more workers load more ({cores} cores are there)"


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the numbers as a table."""
    bare: dict[str, Any] = report["bare"]
    height, width = report["image_size"]
    kind = "clip" if report["frames"] > 1 else "image"
    frames = f"{report['frames']} frames of " if report["frames"] > 1 else ""
    console.print(
        f"{counted(report['images'], 'image' if kind == 'image' else 'video')} of "
        f"{report['data']}, views of {frames}{height} x {width}, batches of "
        f"{report['batch_size']}, {counted(report['cores'], 'core')}, {report['decoder']}",
        highlight=False,
        soft_wrap=True,
    )
    rows = [
        [
            "bare libraries, one process",
            f"{bare['images_per_second']:.0f}",
            f"{bare['best']:.0f}",
            "100",
            "",
        ]
    ]
    for number, found in report["workers"].items():
        memory = found["memory_mb"]
        rows.append(
            [
                counted(number, "worker"),
                f"{found['images_per_second']:.0f}",
                f"{found['best']:.0f}",
                f"{100 * found['share_of_bare']:.0f}",
                "" if memory is None else f"{memory:.0f}",
            ]
        )
    print_table(console, (f"{kind}s/s", "best", "of bare, %", "MB per worker"), rows)
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in bare["ms"].items())
    console.print(f"ms per {kind}: {parts}", highlight=False)
    if "wanted" in report:
        needed, cores = report["workers_needed"], report["cores"]
        spare = (
            ""
            if needed < cores
            else f" (more than {counted(cores, 'core')} leave room for beside training)"
        )
        console.print(
            f"{report['wanted']:g} {kind}s/s need {counted(needed, 'worker')}{spare}",
            highlight=False,
        )
    console.print(f"limited by {report['limit']}", highlight=False, soft_wrap=True)

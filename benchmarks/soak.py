"""Train for a long time, and measure whether memory, file handles or threads of any process grow.

    python benchmarks/soak.py --minutes 60        # writes its section of RESULTS.md

Three trainings of a small model run beside each other: one from a folder, one from shards, and one
that begins again after each epoch, with new loading workers, from the folder and the shards in
turn. Each has one loading worker, and evaluates, draws, reports and saves every 200 steps or each
epoch.

The slope of each number is fitted to the means of blocks of the second half, when caches and the
allocator's free lists are full; its interval is that of the t-distribution. Means of long blocks
are close to independent, as the samples themselves are not.

Two things are known to grow. The report reads the log of the run, 1.5 kB for each of its first
10,000 lines; and safetensors 0.8.0 keeps 64 bytes of each tensor that it reads from an open file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results import machine, table, write_section

KINDS = ("folder", "shards", "begun again")
MEASURES = ("memory, MB", "file handles", "threads")
WARM_UP = 0.5  # share of the time that is left out
BLOCKS = 12
ROUNDING = 1e-9  # a number that never changes has a slope of about 1e-17
IMAGES, SHARDS, SIZE = 480, 4, 48
OPTIONS: dict[str, Any] = {
    "model": "vit_nano",
    "image_size": 32,
    "patch_size": 8,
    "batch_size": 16,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "workers": 1,
    "holdout": 16,
    "device": "cpu",
}


def write_data(folder: Path) -> dict[str, str]:
    """A folder of PNG files and the same images in shards: what --data is for each."""
    import tarfile

    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(IMAGES):
        image = Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8))
        image.save(folder / "images" / f"{number:04d}.png")
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for file in sorted((folder / "images").iterdir())[number::SHARDS]:
                archive.add(file, file.name)
    return {"folder": str(folder / "images"), "shards": f"{folder}/*.tar"}


def train(kind: str, data: dict[str, str], out: Path) -> None:
    """Train until the process is stopped."""
    import torch

    import hpm

    torch.set_num_threads(1)
    if kind != "begun again":
        every = {"checkpoint_every": "200 steps", "eval_every": "200 steps"}
        hpm.pretrain(data[kind], out, steps=10_000_000, **OPTIONS | every)
        return
    for number in range(10_000_000):
        shutil.rmtree(out, ignore_errors=True)
        given = data["shards" if number % 2 else "folder"]
        hpm.pretrain(given, out, steps=IMAGES // OPTIONS["batch_size"], **OPTIONS)
        (out.parent / "epochs.txt").write_text(str(number + 1))


def tree(pid: int) -> Iterator[tuple[str, int]]:
    """(role, process) of a training and its loading workers."""
    yield "training", pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield "worker", int(child)


def measure(pid: int) -> tuple[float, float, float]:
    """MEASURES of a process. Memory is what it allocated, and its share of what it shares with
    others (PSS). Libraries mapped from files do not count: a process's share of them grows when
    any other program that uses them ends."""
    status = Path(f"/proc/{pid}/status").read_text()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: line.split()[1] for line in rollup.splitlines()[1:]}
    kilobytes = int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"])
    threads = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("Threads:"))
    return kilobytes / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads


def sample(trainers: dict[str, subprocess.Popen]) -> Iterator[tuple[str, str, tuple]]:
    """(training, role, measures) of each process."""
    for kind, process in trainers.items():
        if process.poll() is not None:
            raise SystemExit(f"the training of {kind} has ended: {process.returncode}")
        # Between two epochs, a worker may end while it is looked at, or there may be none.
        with contextlib.suppress(OSError, StopIteration):
            for role, pid in tree(process.pid):
                yield kind, role, measure(pid)


def slope(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """(growth per hour, half of its 95 % interval, mean) of the time after the warm-up."""
    from scipy.stats import t

    kept = seconds >= WARM_UP * seconds[-1]
    parts = zip(
        np.array_split(seconds[kept], BLOCKS), np.array_split(values[kept], BLOCKS), strict=True
    )
    x, y = np.array([(times.mean() / 3600, block.mean()) for times, block in parts]).T
    centred = x - x.mean()
    fitted = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - fitted * centred
    error = float(np.sqrt(rest @ rest / (BLOCKS - 2) / (centred @ centred)))
    return fitted, float(t.ppf(0.975, BLOCKS - 2)) * error, float(values[kept].mean())


def rows_of(found: dict[tuple[str, str], list[tuple]]) -> list[list[str]]:
    rows = []
    for (kind, role), samples in found.items():
        times, *columns = np.array([(at, *values) for at, values in samples]).T
        for name, column in zip(MEASURES, columns, strict=True):
            growth, half, mean = slope(times, column)
            grows = "yes" if growth - half > ROUNDING else "no"
            growth = round(growth, 2) + 0.0  # no negative zero
            said = f"{growth:+.2f} ± {half:.2f}"
            rows.append([f"{kind}, {role}", name, f"{mean:.1f}", said, grows])
    return rows


def steps_done(folder: Path) -> str:
    """How far the trainings came."""
    done = []
    for kind in KINDS[:2]:
        lines = (folder / kind / "metrics.jsonl").read_text().splitlines()
        done.append(f"{json.loads(lines[-1])['step']} steps from the {kind}")
    epochs = folder / "epochs.txt"
    done.append(f"{epochs.read_text() if epochs.exists() else 0} epochs begun again")
    return ", ".join(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--note", default="", help="what else the machine did, for the section")
    parser.add_argument("--samples", type=Path, help="file for all samples, as JSON")
    parser.add_argument("--train", nargs=3, help="one training, for this script itself")
    chosen = parser.parse_args()
    if chosen.train:
        kind, data, out = chosen.train
        train(kind, json.loads(data), Path(out))
        return
    found: dict[tuple[str, str], list[tuple]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = json.dumps(write_data(folder))
        trainers = {}
        for kind in KINDS:
            command = [sys.executable, __file__, "--train", kind, data, str(folder / kind)]
            with open(folder / f"{kind}.txt", "w") as file:
                trainers[kind] = subprocess.Popen(command, stderr=file, stdout=file)
        start = time.monotonic()
        try:
            while (now := time.monotonic() - start) < 60 * chosen.minutes:
                for kind, role, values in sample(trainers):
                    found[kind, role].append((now, values))
                time.sleep(chosen.every)
            done = steps_done(folder)
        finally:
            for process in trainers.values():
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
    if chosen.samples:
        chosen.samples.write_text(json.dumps([[*key, s] for key, s in found.items()]))
    rows = rows_of(found)
    head = ["process", "number", "mean", "growth per hour", "grows"]
    text = (
        f"## Soak\n\n`python benchmarks/soak.py --minutes {chosen.minutes:g}` on {machine()}"
        f"{f', {chosen.note}' if chosen.note else ''}: {done}. Growth with its 95 % interval, "
        f"from {BLOCKS} blocks after the first {WARM_UP:.0%} of the time. "
        "Memory is PSS without libraries mapped from files.\n\n"
        f"{table(head, rows)}"
    )
    write_section("soak", text)
    print(text)


if __name__ == "__main__":
    main()

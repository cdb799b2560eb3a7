"""Time streams beside files: `python benchmarks/streams.py PHOTOS`.

The same JPEG images are read from a folder, and as archives, parquet (by `datasets`) and LitData
chunks, from the disk and from web servers on this machine, each in a process of its own. All make
the same views in one loading worker, in turns, so that other load affects all alike. The processor
time is that of a second pass without a worker, from the file to the batch.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from results import machine, table, write_section

from hpm.data.loader import Batch, StepSampler, TrainingViews, training_loader
from hpm.data.sources import open_data, open_source
from hpm.data.streams.loading import Sharing, StreamOrder, StreamSteps, stream_batches
from hpm.data.streams.stream import Stream

TESTS = Path(__file__).parents[1] / "tests"
SIDE, BATCH, SHARDS, SHUFFLE = 224, 32, 8, 128
Read = Callable[[int, int], Iterator[Batch]]  # (number of workers, number of steps)


@dataclass(frozen=True)
class Way:
    """A way to the images."""

    name: str
    read: Read


def write_all(photos: list[Path], root: Path) -> None:
    """The images as a folder, archives, parquet on a hub, and LitData."""
    sys.path.insert(0, str(TESTS))
    import pyarrow
    import pyarrow.parquet
    from litdata_folders import write_litdata  # type: ignore[import-not-found]

    content = [photo.read_bytes() for photo in photos]
    for name in ("folder", "tars", "hub/me/photos"):
        (root / name).mkdir(parents=True)
    for number, data in enumerate(content):
        (root / "folder" / f"{number:05d}.jpg").write_bytes(data)
    each = -(-len(content) // SHARDS)
    for shard in range(SHARDS):
        part = content[shard * each :][:each]
        with tarfile.open(root / "tars" / f"s-{shard}.tar", "w") as archive:
            for number, data in enumerate(part):
                member = tarfile.TarInfo(f"{number:05d}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        rows = pyarrow.table({"image": [{"bytes": data, "path": None} for data in part]})
        features = '{"info": {"features": {"image": {"_type": "Image"}}}}'
        rows = rows.replace_schema_metadata({"huggingface": features})
        file = root / "hub/me/photos" / f"train-{shard}.parquet"
        pyarrow.parquet.write_table(rows, file, row_group_size=100)
    write_litdata(root / "litdata", [{"image": c} for c in content], {"image": "jpeg"}, each)


def start_servers(root: Path, stack: ExitStack) -> tuple[str, str]:
    """Addresses of a web server of the files, and of a hub."""
    found = []
    for code in (
        "import functools, http.server, sys\n"
        "handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)\n",
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\n"
        "from hub import Hub\nserver = Hub(Path(sys.argv[1]) / 'hub')\n",
    ):
        code += "print(server.server_address[1], flush=True)\nserver.serve_forever()\n"
        server = subprocess.Popen(
            [sys.executable, "-c", code, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(server.kill)
        assert server.stdout is not None
        found.append(f"http://127.0.0.1:{int(server.stdout.readline())}")
    return found[0], found[1]


def views() -> TrainingViews:
    return TrainingViews((SIDE, SIDE), 3, 0, (0.2, 1.0), True, 1)


def read_folder(folder: str, workers: int, steps: int) -> Iterator[Batch]:
    source = open_source(folder).train
    sampler = StepSampler(len(source), BATCH, steps, seed=0)
    yield from training_loader(source, views(), sampler, workers, pin_memory=False)


def read_stream(stream: Stream, workers: int, steps: int) -> Iterator[Batch]:
    order = StreamOrder(stream, Sharing(1, max(1, workers)), 0, SHUFFLE, 0, BATCH, 1)
    made = StreamSteps(order, views(), False, {})
    yield from stream_batches(made, 0, steps, workers, pin_memory=False)


def measure(way: Way, workers: int, steps: int) -> tuple[float, float]:
    """(seconds, processor seconds of this process) per image, after the first batches."""
    first = 4 if workers else 1
    for number, _ in enumerate(way.read(workers, steps + first)):
        if number == first - 1:
            began, worked = time.perf_counter(), time.process_time()
    images = steps * BATCH
    return (time.perf_counter() - began) / images, (time.process_time() - worked) / images


def ways(root: Path, files: str, hub: bool) -> list[Way]:
    def stream(name: str, data: str) -> Way:
        opened = open_data(data, in_order=True)
        assert isinstance(opened, Stream)
        return Way(name, partial(read_stream, opened))

    found = [
        Way("folder", partial(read_folder, str(root / "folder"))),
        stream("archives", f"{root}/tars/*.tar"),
        stream("archives, HTTP", f"{files}/tars/s-{{0..{SHARDS - 1}}}.tar"),
        stream("LitData", str(root / "litdata")),
        stream("LitData, HTTP", f"{files}/litdata/"),
    ]
    if hub:
        found.append(stream("parquet", str(root / "hub/me/photos")))
        found.append(stream("hf://, HTTP", "hf://me/photos"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="folder of JPEG images")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12, help="batches of 32 in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    args = parser.parse_args()
    photos = sorted(args.photos.rglob("*.[jJ][pP]*[gG]"))[: args.images]
    if not photos:
        parser.error(f"no JPEG file in {args.photos}")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_all(photos, root)
        files, hub = start_servers(root, stack)
        os.environ |= {"HF_ENDPOINT": hub, "HF_HOME": str(root / "home")}
        try:
            import datasets  # noqa: F401
        except ImportError:
            print("datasets is not installed: parquet and hf:// are left out")
            hub = ""
        everything = ways(root, files, bool(hub))
        wall: dict[str, list[float]] = {way.name: [] for way in everything}
        cpu: dict[str, list[float]] = {way.name: [] for way in everything}
        for number in range(args.rounds):
            for way in everything:
                wall[way.name].append(measure(way, 1, args.steps)[0])
                if number < 3:
                    cpu[way.name].append(measure(way, 0, args.steps // 3)[1])
            print(f"round {number + 1} of {args.rounds}", flush=True)
    size = sum(photo.stat().st_size for photo in photos) / len(photos) / 1000
    report(wall, cpu, len(photos), size, args)


def report(
    wall: dict[str, list[float]],
    cpu: dict[str, list[float]],
    images: int,
    size: float,
    args: argparse.Namespace,
) -> None:
    rows = []
    for name, seconds in wall.items():
        ratios = sorted(base / each for base, each in zip(wall["folder"], seconds, strict=True))
        rows.append(
            [
                name,
                f"{1 / statistics.median(seconds):.0f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{1000 * min(cpu[name]):.2f}",
            ]
        )
    head = ["read as", "images / s", "of the folder's speed (all rounds)", "CPU ms / image"]
    text = (
        "## Streams\n\n"
        f"`python benchmarks/streams.py {args.photos.name}` on {machine()}. {images} "
        f"photographs of {size:.0f} kB; views of {SIDE} px in batches of {BATCH}, one loading "
        f"worker; medians of {args.rounds} rounds of {args.steps} batches, in turns. The servers "
        "run on the same machine. CPU: the best of three rounds without a worker, of the reading "
        "process only.\n\n" + table(head, rows)
    )
    print(text)
    if not args.dry:
        write_section("streams", text)


if __name__ == "__main__":
    main()

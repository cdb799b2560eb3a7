"""How fast ordinary H.264 files are decoded: the loader beside bare PyAV.

    python benchmarks/video_data.py         # makes its files with ffmpeg; under 3 minutes

The files are as those of Kinetics are often kept: H.264, yuv420p, 30 frames per second, 340 x 256,
400 kb/s, ten seconds, a key frame every two.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from results import machine, write_section
from rich.console import Console

from hpm.commands.bench_data import print_report

GOAL = 0.85  # of bare PyAV times the number of workers
ENCODING = "-c:v libx264 -preset veryfast -b:v 400k -pix_fmt yuv420p -g 60 -keyint_min 60"
LOADING = "--frames 16 --frame-stride 4 --image-size 224 --batch-size 16 --images 96 --repeats 5"


def write_videos(folder: Path, count: int) -> None:
    """Moving patterns with noise, of another seed each."""
    if shutil.which("ffmpeg") is None:
        raise SystemExit("ffmpeg is not installed: it makes the files")
    for number in range(count):
        picture = "testsrc2=size=340x256:rate=30:duration=10"
        picture += f",noise=alls=6:allf=t:all_seed={number}"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, *ENCODING.split()]
        subprocess.run([*command, "-sc_threshold", "0", folder / f"{number:02d}.mp4"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--workers", type=int, help="the most to try (default: number of cores)")
    parser.add_argument("--try", action="store_true", dest="dry", help="print, and write nothing")
    chosen = parser.parse_args()
    loading = LOADING + (f" --workers {chosen.workers}" if chosen.workers else "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "videos"
        folder.mkdir()
        write_videos(folder, chosen.videos)
        file = Path(name) / "report.json"
        command = [sys.executable, "-m", "hpm", "bench", "data", str(folder), *loading.split()]
        subprocess.run([*command, "--json", str(file)], check=True)
        report = json.loads(file.read_text())
    report["data"] = f"files by ffmpeg ({ENCODING})"
    text = io.StringIO()
    print_report(report, Console(file=text, width=100))
    shares = [found["share_of_bare"] for found in report["workers"].values()]
    reached = "reached" if min(shares) >= GOAL else "not reached"
    if not chosen.dry:
        write_section(
            "video data",
            f"## Decoding H.264\n\n`python benchmarks/video_data.py`, which is `hpm bench data "
            f"VIDEOS {loading}`, on {machine()}.\n\n```\n{text.getvalue().rstrip()}\n```\n\n"
            f"The goal, {100 * GOAL:.0f} % of bare PyAV times workers, is {reached}.",
        )
    print(f"the goal of {100 * GOAL:.0f} % is {reached}")


if __name__ == "__main__":
    main()

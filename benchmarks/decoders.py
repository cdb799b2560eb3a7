"""Compare image decoders and resizing on one core: `python benchmarks/decoders.py PHOTOS`.

All are measured in turns, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from results import machine, table, write_section

from hpm.data.arrays import BICUBIC
from hpm.data.jpeg import reduction
from hpm.data.pillow import open_by_pillow
from hpm.data.transforms import least_size, random_crop

SIZE, SCALE = (224, 224), (0.2, 1.0)
ENLARGED = (4000, 3000)  # of a camera
Array = np.ndarray  # [H W 3]
Decode = Callable[[bytes], Array]
Resize = Callable[[Array, tuple[int, int, int, int]], Any]


def by_pillow(data: bytes) -> Array:
    return np.asarray(open_by_pillow(io.BytesIO(data)).convert("RGB"))


def by_pillow_draft(data: bytes) -> Array:
    image = open_by_pillow(io.BytesIO(data))
    image.draft("RGB", least_size(SIZE, SCALE[0])[::-1])
    return np.asarray(image.convert("RGB"))


def resized_by_pillow(pixels: Array, box: tuple[int, int, int, int]) -> Any:
    return Image.fromarray(pixels).resize(SIZE, BICUBIC, box=box)


def resized_by_torch(pixels: Array, box: tuple[int, int, int, int]) -> Any:
    left, top, right, bottom = box
    crop = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return F.interpolate(crop, SIZE, mode="bicubic", antialias=True)


def decoders() -> tuple[dict[str, Decode], list[str]]:
    """(decoders that can be imported, reasons why others cannot)."""
    found: dict[str, Decode] = {"Pillow": by_pillow, "Pillow, draft": by_pillow_draft}
    missing = []
    try:
        import simplejpeg

        def reduced(data: bytes) -> Array:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            scale = reduction((width, height), least_size(SIZE, SCALE[0]))
            return simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_width=-(-width // scale),
                min_height=-(-height // scale),
                min_factor=scale,
            )

        found["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "RGB")
        found["simplejpeg, reduced"] = reduced
    except ImportError as error:
        missing.append(f"simplejpeg ({_line(error)})")
    try:
        import cv2

        cv2.setNumThreads(1)

        def by_opencv(data: bytes) -> Array:
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

        found["OpenCV"] = by_opencv
    except ImportError as error:
        missing.append(f"OpenCV ({_line(error)})")
    try:
        from torchcodec.decoders import decode_image

        def by_torchcodec(data: bytes) -> Array:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_image(encoded).permute(1, 2, 0).numpy()

        found["TorchCodec"] = by_torchcodec
    except (ImportError, OSError, RuntimeError) as error:
        missing.append(f"TorchCodec ({_line(error)})")
    return found, missing


def resizes() -> dict[str, Resize]:
    found: dict[str, Resize] = {
        "Pillow (with box)": resized_by_pillow,
        "PyTorch (uint8)": resized_by_torch,
    }
    try:
        import cv2

        def by_opencv(pixels: Array, box: tuple[int, int, int, int]) -> Any:
            left, top, right, bottom = box
            shrinks = right - left > SIZE[1] or bottom - top > SIZE[0]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            return cv2.resize(pixels[top:bottom, left:right], SIZE, interpolation=how)

        found["OpenCV (area or cubic, which is not this filter)"] = by_opencv
    except ImportError:
        pass
    return found


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(": /")[0][:80]


def rates(ways: dict[str, Callable[[int], Any]], count: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each way in each round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for index in range(count):
                way(index)
            found[name].append(count / (time.perf_counter() - start))
    return found


def measure(files: list[bytes], rounds: int, titles: tuple[str, str]) -> list[str]:
    """Two tables: decoding only; decoding, random crop and resizing."""
    ways, _ = decoders()
    rng = np.random.default_rng(0)

    def view(decode: Decode, resize: Resize) -> Callable[[int], Any]:
        def make(index: int) -> Any:
            pixels = decode(files[index])
            box = random_crop(rng, pixels.shape[1], pixels.shape[0], SCALE)
            return resize(pixels, box)

        return make

    def only(decode: Decode) -> Callable[[int], Any]:
        return lambda index: decode(files[index])

    alone = {name: only(decode) for name, decode in ways.items()}
    views = {
        f"{name} | {resize_name}": view(decode, resize)
        for name, decode in ways.items()
        for resize_name, resize in resizes().items()
    }
    parts = []
    for title, chosen in zip(titles, (alone, views), strict=True):
        found = rates(chosen, len(files), rounds)
        rows = [
            [*name.split(" | "), f"{max(r):.0f}", f"{statistics.median(r):.0f}"]
            for name, r in sorted(found.items(), key=lambda item: -max(item[1]))
        ]
        head = ["decoder", *(["resize"] if chosen is views else []), "best", "median"]
        parts.append(f"{title}\n\n{table(head, rows)}")
    return parts


def enlarged(data: bytes) -> bytes:
    file = io.BytesIO()
    open_by_pillow(io.BytesIO(data)).convert("RGB").resize(ENLARGED, BICUBIC).save(
        file, "jpeg", quality=90
    )
    return file.getvalue()


def differences(files: list[bytes]) -> str:
    """The difference between PyTorch's uint8 resize and Pillow's on the same crops."""
    rng = np.random.default_rng(0)
    largest, total, edges = 0, 0.0, 0
    for data in files:
        pixels = by_pillow(data)
        box = random_crop(rng, pixels.shape[1], pixels.shape[0], SCALE)
        ours = resized_by_torch(pixels, box)[0].permute(1, 2, 0).numpy().astype(int)
        part = Image.fromarray(pixels).crop(box).resize(SIZE, BICUBIC)
        difference = abs(ours - np.asarray(part))
        largest, total = max(largest, difference.max()), total + difference.mean()
        edges = max(edges, abs(ours - np.asarray(resized_by_pillow(pixels, box))).max())
    return (
        f"PyTorch's resize of a crop differs from Pillow's by {total / len(files):.2f} of 255 on "
        f"average and by {largest} at most (both round between rows and columns); from Pillow's "
        f"resize with `box`, which looks beyond the edges of the crop, by {edges} at most, there."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--large-images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    paths = [p for p in sorted(chosen.photos.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg")]
    files = [path.read_bytes() for path in paths[: chosen.images]]
    large = [enlarged(data) for data in files[: chosen.large_images]]
    pixels = statistics.mean(math.prod(open_by_pillow(io.BytesIO(f)).size) for f in files)
    _, missing = decoders()
    lines = [
        "## Decoders",
        f"`python benchmarks/decoders.py PHOTOS` on {machine()}; one thread, images per second, "
        f"{chosen.rounds} rounds in turns. "
        + (f"Not here: {'; '.join(missing)}." if missing else ""),
        *measure(
            files,
            chosen.rounds,
            (
                f"Decoding {len(files)} photographs of {pixels / 1e6:.2f} megapixels:",
                f"The same, a random crop, and its resize to {SIZE[0]} x {SIZE[1]}:",
            ),
        ),
        *measure(
            large,
            chosen.rounds,
            (
                f"Decoding {len(large)} of them enlarged to {ENLARGED[0]} x {ENLARGED[1]}:",
                f"The same, a random crop, and its resize to {SIZE[0]} x {SIZE[1]}:",
            ),
        ),
        differences(files),
    ]
    write_section("decoders", "\n\n".join(lines))


if __name__ == "__main__":
    main()

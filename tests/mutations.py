"""Damaged image, clip and archive files, read as a training reads them, under a limit on memory.

    python tests/mutations.py COUNT FIRST FOLDER      # where FOLDER has files to damage

Prints a line of JSON for each kind of file: how many there were and how many could be read, the
longest time and the memory beyond that of the program. An error that a training does not catch is
printed and ends the program with 1; a crash or a hang is left to whoever started it: `current` in
FOLDER names the file.
"""

import faulthandler
import json
import re
import resource
import struct
import sys
import tarfile
import time
import zlib
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image
from videos import write_video

from hpm.core.errors import UserError
from hpm.data.loader import Views, training_views
from hpm.data.sources import FileSource
from hpm.data.streams.archives import images_of
from hpm.data.streams.head import open_entry
from hpm.data.transforms import decode, evaluation_view
from hpm.data.video.sampling import ClipSampling
from hpm.data.video.sources import VideoFiles

MEMORY = 3 << 30  # bytes beyond what the program has when it starts
SECONDS = 120  # for one file, on a machine that does much else
DEEP = ("e.tif", "b.npy")  # samples of five channels
HUGE = (0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 30_000, 13_000)


def write_samples(folder: Path) -> None:
    """A few whole files of each kind."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8)).resize((75, 90))
    deep = (np.asarray(small.convert("L")).astype(np.uint16) * 257)[..., None].repeat(5, 2)
    exif = Image.Exif()
    exif[274] = 6
    small.save(folder / "a.jpg", exif=exif)
    small.save(folder / "b.jpg", progressive=True, quality=60)
    small.convert("CMYK").save(folder / "c.jpg")
    small.save(folder / "a.png")
    small.quantize(32).save(folder / "b.png")
    Image.fromarray(deep[..., 0]).save(folder / "c.png")
    small.save(folder / "a.webp")
    small.save(folder / "b.webp", lossless=True)
    small.save(folder / "a.gif")
    small.save(folder / "a.bmp")
    small.save(folder / "a.ppm")
    for name, compression in (("a", None), ("b", "tiff_lzw"), ("c", "jpeg"), ("d", "tiff_deflate")):
        small.save(folder / f"{name}.tif", compression=compression)
    _write_deep(folder / "e.tif", deep)
    np.save(folder / "a.npy", np.asarray(small))
    np.save(folder / "b.npy", deep.astype(np.float32) / 65535)
    write_video(folder / "a.mp4", 12)
    write_video(folder / "b.webm", 12)
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as archive:
            for image in ("a.jpg", "a.png", "b.png"):
                archive.add(folder / image, f"{'long/' * 30}{image}")


def channels_of(sample: Path) -> int:
    return 5 if sample.name in DEEP else 3


def _write_deep(file: Path, array: np.ndarray) -> None:
    try:
        import tifffile
    except ImportError:
        return
    tifffile.imwrite(file, array, planarconfig="contig", photometric="minisblack")


def mutated(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """The data with one to three kinds of damage."""
    for _ in range(int(rng.integers(1, 4))):
        data = DAMAGES[int(rng.integers(len(DAMAGES)))](bytearray(data), rng, others)
    return data


def _bits(data, rng, others):
    for _ in range(int(rng.integers(1, 9))):
        if data:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _head(data, rng, others):
    """Bytes of the first hundred, where sizes are."""
    for _ in range(int(rng.integers(1, 5))):
        if data:
            data[int(rng.integers(min(len(data), 100)))] = int(rng.integers(256))
    return bytes(data)


def _number(data, rng, others):
    """A number of two, four or eight bytes, in either order, wherever it comes to lie."""
    value, form = HUGE[int(rng.integers(len(HUGE)))], "><"[int(rng.integers(2))]
    size = (2, 4, 8)[int(rng.integers(3))]
    code = struct.pack(form + {2: "H", 4: "I", 8: "Q"}[size], value & ((1 << 8 * size) - 1))
    at = int(rng.integers(max(1, min(len(data), 400) - size)))
    data[at : at + size] = code
    return bytes(data)


def _cut(data, rng, others):
    return bytes(data[: int(rng.integers(len(data) + 1))])


def _without(data, rng, others):
    start = int(rng.integers(len(data) + 1))
    del data[start : start + int(rng.integers(1, 200))]
    return bytes(data)


def _twice(data, rng, others):
    start = int(rng.integers(len(data) + 1))
    part = data[start : start + int(rng.integers(1, 2000))]
    return bytes(data[:start] + part + data[start:])


def _other(data, rng, others):
    other = others[int(rng.integers(len(others)))]
    at = int(rng.integers(len(data) + 1))
    return bytes(data[:at]) + other[int(rng.integers(len(other) + 1)) :]


def _filled(data, rng, others):
    start, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 100))
    data[start : start + length] = bytes([int(rng.choice([0, 255, 32]))]) * length
    return bytes(data)


def _none(data, rng, others):
    return (b"", b"\0", b"<html>no such image</html>", rng.bytes(500))[int(rng.integers(4))]


def _dimensions(data, rng, others):
    """A huge width or height where the format keeps it, with a checksum that is right."""
    value = HUGE[int(rng.integers(len(HUGE)))]
    if data[:4] == b"\x89PNG" and len(data) > 33:
        at = 16 + 4 * int(rng.integers(2))
        data[at : at + 4] = struct.pack(">I", value)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"\xff\xd8":
        for found in re.finditer(rb"\xff[\xc0\xc2]", data):
            at = found.start() + 5
            data[at : at + 4] = struct.pack(">HH", value & 0xFFFF, 0xFFFF)
            break
    elif data[:6] == b"\x93NUMPY":
        head = data[10 : 10 + int.from_bytes(data[8:10], "little")]
        changed = re.sub(rb"\((\d+), ", b"(%d, " % value, bytes(head), count=1)
        changed = changed.replace(b" " * (len(changed) - len(head)) + b"\n", b"\n")
        data[10 : 10 + len(head)] = changed
    elif data[:4] in (b"II*\0", b"MM\0*"):
        order = ">" if data[:2] == b"MM" else "<"
        for tag in (256, 257):  # width, length: a tag, a type, a count, the value
            at = bytes(data).find(struct.pack(order + "HH", tag, 3))
            if at >= 0 and rng.integers(2):
                data[at + 2 : at + 12] = struct.pack(order + "HII", 4, 1, value)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        data[6:10] = struct.pack("<HH", value & 0xFFFF, 0xFFFF)
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<II", value, value)
    elif data[:2] == b"P6":
        data[2:9] = b"\n%d 9" % value
    return bytes(data)


DAMAGES = (_bits, _head, _number, _cut, _without, _twice, _other, _filled, _none, _dimensions)


def read_as_trained(path: Path, channels: int) -> bool:
    """Read a file as a loading worker does. Returns whether it could be read."""
    if ".tar" in path.name:
        return _read_archive(path)
    if path.suffix in (".mp4", ".webm"):
        source, sampling = VideoFiles("clips", [path]), ClipSampling(4, 2)
    else:
        source, sampling = FileSource("images", [path]), None
    views = training_views(source, (32, 32), channels, 0, (0.2, 1.0), True, 8, sampling)
    sample = Views(source, views, stand_in=False)[0, 0]
    if sample.view is not None:
        assert sample.view.shape == (channels, *(() if sampling is None else (4,)), 32, 32)
        if sampling is None:
            evaluation_view(source.open(0), (32, 32), channels, 8, 0.875)
    return sample.view is not None


def _read_archive(path: Path) -> bool:
    from hpm.data.arrays import UnreadableImage

    try:
        with closing(images_of(str(path))) as images:
            for entry in images:
                try:
                    decode(open_entry(entry), 3)
                except (UnreadableImage, OSError):
                    continue
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def peak() -> int:
    """Most memory that the program ever had, in bytes."""
    (found,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found) << 10


def main(count: int, first: int, folder: Path) -> int:
    files = sorted(path for path in folder.iterdir() if path.suffix)
    contents = [path.read_bytes() for path in files]
    damaged = folder / "damaged"
    damaged.mkdir(exist_ok=True)
    for path in files:  # what the decoders themselves need is no part of the measurement
        assert read_as_trained(path, channels_of(path)), path
    (size,) = re.findall(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_AS, ((int(size) << 10) + MEMORY,) * 2)
    found = defaultdict(lambda: {"files": 0, "read": 0, "seconds": 0.0, "megabytes": 0})
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        which = number % len(files)
        path = damaged / f"x{''.join(files[which].suffixes)}"
        path.write_bytes(mutated(contents[which], rng, contents))
        (folder / "current").write_text(f"{number} {files[which].name}")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        before, start = peak(), time.process_time()
        try:
            readable = read_as_trained(path, channels_of(files[which]))
        except BaseException:
            print(f"mutation {number} of {files[which].name}, kept as {path}", file=sys.stderr)
            raise
        faulthandler.cancel_dump_traceback_later()
        seen = found[path.suffix]
        seen["files"] += 1
        seen["read"] += readable
        seen["seconds"] = round(max(seen["seconds"], time.process_time() - start), 2)
        seen["megabytes"] = max(seen["megabytes"], peak() - before >> 20)
    for suffix, seen in sorted(found.items()):
        print(json.dumps({"suffix": suffix} | seen))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))

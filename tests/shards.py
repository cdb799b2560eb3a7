"""Archives of small images, and a web server that misbehaves when told to."""

import contextlib
import http.server
import io
import socket
import struct
import tarfile
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image


def png(number: int, size: int = 20) -> bytes:
    """An image that depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int = 4, images: int = 12) -> Path:
    """`s-0.tar`, `s-1.tar`, ...: each with images and, as WebDataset has them, their labels. The
    shards differ in size."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        files = {}
        for number in range(images + shard):
            name = f"{shard}_{number:03d}"
            files |= {f"{name}.png": png(1000 * shard + number), f"{name}.json": b"{}"}
        write_tar(folder / f"s-{shard}.tar", files)
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults` holds what becomes of the next requests for a name: a status, `cut`
    (closes in the middle), `reset` (the connection, in the middle), or `stall` (sends nothing until
    the test ends)."""

    def __init__(self, folder: Path, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name, asked = self.path.lstrip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        fault = self.server.faults[name].pop(0) if self.server.faults[name] else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "stall":
            self.server.ended.wait(30)
            return None
        file = self.server.folder / name
        if not file.exists():
            return self.send_error(404)
        data, start = file.read_bytes(), 0
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "reset") else body)
            if fault == "reset":
                now = struct.pack("ii", 1, 0)  # linger for no time: send RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
                self.connection.close()
        return None

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder: Path, ranges: bool = True):
    server = Server(folder, ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def no_waiting(monkeypatch, timeout=30.0):
    """Attempts follow each other at once; a stalled connection is given up after `timeout`."""
    from hpm.data.streams import transport

    monkeypatch.setattr(transport, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(transport, "TIMEOUT", timeout)


__all__ = ["no_waiting", "png", "serving", "write_shards", "write_tar"]

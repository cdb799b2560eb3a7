"""The server of `hpm view`.

It keeps no state between requests and writes nothing to disk. It binds to the loopback address, and
checks the Host header of each request against DNS rebinding.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qs, urlsplit

from hpm.core.errors import UserError

ADDRESS = "127.0.0.1"
PORT, PORTS_TRIED = 7860, 40
MAX_BYTES = 32 * 2**20  # of an image
TIMEOUT = 60  # seconds without data after which a request is dropped


@runtime_checkable
class Viewer(Protocol):
    """What is served: see `hpm.show.view.Viewer`."""

    def page(self) -> str: ...

    def answer(self, settings: dict[str, str], body: bytes) -> dict[str, Any]: ...


def make_server(viewer: Viewer, port: int | None) -> ThreadingHTTPServer:
    """A server on this port, by default on the first free one from 7860. Raises UserError if it is
    taken."""
    ports = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    for candidate in ports:
        if not 0 <= candidate < 2**16:
            raise UserError(f"port is {candidate}; it must lie between 0 (any free one) and 65535")
        try:
            return Server((ADDRESS, candidate), viewer)
        except OSError as error:
            problem = error.strerror
    taken = f"{port} is" if port is not None else f"{ports[0]} to {ports[-1]} are"
    raise UserError(f"port {taken} not free ({problem}): choose another --port")


class Server(ThreadingHTTPServer):
    """Holds the viewer, its page, and the accepted Host headers. Closing it waits for running
    requests: Python may abort if it ends while a thread is in PyTorch's code."""

    daemon_threads = False

    def __init__(self, address: tuple[str, int], viewer: Viewer):
        self._connections: set[socket.socket] = set()
        super().__init__(address, Handler)
        self.viewer = viewer
        self.page = viewer.page().encode()
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        # Browsers keep connections open on which they send nothing: do not wait for these.
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A closed connection is not an error.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /show?mask_ratio=...&hard_share=...&seed=... with an image as body
    (or with example=N and no body) gives its panels as JSON."""

    server: Server
    timeout = TIMEOUT

    def do_GET(self) -> None:
        if not self._is_ours():
            self._refuse(
                HTTPStatus.FORBIDDEN, "this server accepts requests from this machine only"
            )
        elif urlsplit(self.path).path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is only the page /")
        else:
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        url, length = urlsplit(self.path), self.headers.get("Content-Length", "")
        known = length.isascii() and length.isdigit()
        # Read the body before answering: a client that is still sending may miss the answer.
        body = self.rfile.read(int(length)) if known and int(length) <= MAX_BYTES else b""
        if not self._is_ours():
            self._refuse(
                HTTPStatus.FORBIDDEN, "this server accepts requests from its own page only"
            )
        elif url.path != "/show":
            self._refuse(HTTPStatus.NOT_FOUND, "post images to /show")
        elif not known:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is required")
        elif int(length) > MAX_BYTES:
            message = f"this image has more than {MAX_BYTES // 2**20} MB"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        else:
            settings = {name: values[-1] for name, values in parse_qs(url.query).items()}
            self._send_json(HTTPStatus.OK, self.server.viewer.answer(settings, body))

    def _is_ours(self) -> bool:
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in self.server.hosts and (
            origin is None or origin.removeprefix("http://") in self.server.hosts
        )

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send_json(status, {"error": message})

    def _send_json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(values).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests to the terminal."""

"""A Hugging Face hub on this machine, with as much of its interface as `datasets` asks for."""

import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves `folder/user/name/...` as data sets of one commit. `requests` are method and path of
    all so far. `failures`: how many of the next requests for the content of files fail."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.failures = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self._answer_api("/".join(parts[2:4]), parts[4:])
        if parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            if parts[4] not in ("main", COMMIT):
                return self._missing("RevisionNotFound")
            return self._answer_file("/".join(parts[1:3]), "/".join(parts[5:]))
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        self.server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[4:5] != ["paths-info"]:
            return self._missing("EntryNotFound")
        asked = json.loads(body) if body.startswith("{") else parse_qs(body)
        paths = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]
        entries = self._entries("/".join(parts[2:4]))
        return self._answer_json([entry for entry in entries if entry["path"] in paths])

    def _answer_api(self, repo: str, rest: list[str]):
        if not (self.server.folder / repo).is_dir():
            return self._missing("RepoNotFound")
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            return self._answer_json(
                [e for e in self._entries(repo) if not below or e["path"].startswith(f"{below}/")]
            )
        if rest and rest[0] != "revision":
            return self._missing("EntryNotFound")
        if rest and rest[1] not in ("main", COMMIT):
            return self._missing("RevisionNotFound")
        siblings = [{"rfilename": e["path"]} for e in self._entries(repo) if e["type"] == "file"]
        return self._answer_json(
            {"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        )

    def _entries(self, repo: str) -> list[dict]:
        root = self.server.folder / repo
        found = []
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            oid = hashlib.sha1(name.encode()).hexdigest()
            if path.is_dir():
                found.append({"type": "directory", "path": name, "size": 0, "oid": oid})
            else:
                found.append(
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}
                )
        return found

    def _answer_file(self, repo: str, name: str):
        file = self.server.folder / repo / name
        if not file.is_file():
            known = (self.server.folder / repo).is_dir()
            return self._missing("EntryNotFound" if known else "RepoNotFound")
        if self.command == "GET" and self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        asked, about, start = self.headers.get("Range"), file.stat(), 0
        length = size = about.st_size
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            length = min(int(last) + 1 if last else size, size) - start
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(length))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        # As a hub does, which knows the hash of each file: nothing is read for it.
        tag = hashlib.sha1(f"{name} {size} {about.st_mtime_ns}".encode()).hexdigest()
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError), file.open("rb") as content:
                content.seek(start)
                self.wfile.write(content.read(length))
        return None

    def _answer_json(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hub_serving(folder: Path):
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextlib.contextmanager
def hub_in_use(folder: Path, cache: Path):
    """A hub that `datasets` uses in this process, with a cache of its own."""
    import datasets
    from huggingface_hub import constants

    with hub_serving(folder) as hub, pytest.MonkeyPatch.context() as patch:
        for module, values in {
            constants: {
                "ENDPOINT": hub.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_CACHE": str(cache / "hub"),
                "HF_HUB_OFFLINE": False,
            },
            datasets.config: {
                "HF_ENDPOINT": hub.url,
                "HF_HUB_OFFLINE": False,
                "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
                "HF_DATASETS_CACHE": cache / "datasets",
                "DOWNLOADED_DATASETS_PATH": cache / "downloads",
                "EXTRACTED_DATASETS_PATH": cache / "extracted",
            },
        }.items():
            for name, value in values.items():
                assert hasattr(module, name), name
                patch.setattr(module, name, value)
        yield hub

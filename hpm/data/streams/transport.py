"""Read a file from its beginning: from a disk, over HTTP, or from an object store as S3.

It is read again from where it broke off, a bounded number of times.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

from hpm.core.errors import UserError, one_line, why
from hpm.core.extras import need
from hpm.core.retries import may_pass

TIMEOUT = 30.0  # seconds without an answer or without data
ATTEMPTS = 6  # in a row without data
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled before each further one
TEMPORARY_STATUS = (408, 425, 429)  # and all from 500 on


class Permanent(Exception):
    """An answer that another attempt would not change. The text says what it was."""


@runtime_checkable
class Body(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Opened(NamedTuple):
    """An answer: its body from the asked byte on, the length of the whole file (None if it is not
    said), and what changes with the file's content."""

    body: Body
    length: int | None
    version: str | None


class RestartingFile:
    """A file, as what tarfile reads. `open_at` opens it at a byte; it raises Permanent, or
    any other error if another attempt may succeed. Raises UserError when the attempts are used
    up."""

    def __init__(self, url: str, open_at: Callable[[int], Opened]):
        self.url, self._open_at = url, open_at
        self._at = 0
        self._opened: Opened | None = None
        self._version: str | None = None

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return self._read(size)
            except Permanent as error:
                raise UserError(f"{self.url}: {error}") from None
            except UserError:
                raise
            except Exception as error:  # each library has its own for a lost connection
                self.close()
                problem = one_line(error, 200) or type(error).__name__
        raise UserError(f"{self.url}: {problem} ({ATTEMPTS} attempts)")

    def close(self) -> None:
        if self._opened is not None:
            with suppress(Exception):
                self._opened.body.close()
        self._opened = None

    def _read(self, size: int) -> bytes:
        if self._opened is None:
            self._opened = self._open_at(self._at)
            if self._version not in (None, self._opened.version):
                raise Permanent("it has changed while it was read")
            self._version = self._opened.version
        data = self._opened.body.read(size)
        length = self._opened.length
        if not data and length is not None and self._at < length:
            raise ConnectionError(f"the connection closed after {self._at} of {length} bytes")
        self._at += len(data)
        return data


def opened(url: str) -> closing[RestartingFile]:
    """Open a path, `http://`, `https://` or `s3://` for reading from the beginning.

    Raises UserError when it is read, if it cannot be.
    """
    open_at = _s3_at if url.startswith("s3://") else _http_at if is_remote(url) else _path_at
    return closing(RestartingFile(url, lambda start: open_at(url, start)))


def _path_at(path: str, start: int) -> Opened:
    try:
        file = open(path, "rb")  # noqa: SIM115
        file.seek(start)
        about = os.fstat(file.fileno())
    except OSError as error:
        if may_pass(error):
            raise
        raise Permanent(why(error)) from None
    return Opened(file, about.st_size, f"{about.st_size} {about.st_mtime_ns}")


def is_remote(url: str) -> bool:
    return url.startswith(("http://", "https://", "s3://"))


def _http_at(url: str, start: int) -> Opened:
    headers = {"User-Agent": "hpm"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), None, TIMEOUT)
    except urllib.error.HTTPError as error:
        text = f"the server answers {error.code} {error.reason}"
        if error.code >= 500 or error.code in TEMPORARY_STATUS:
            raise ConnectionError(text) from None
        raise Permanent(text) from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"no connection: {error.reason}") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise Permanent(one_line(error)) from None
    length = answer.headers.get("Content-Length")
    rest = int(length) if length is not None and length.isdigit() else None
    if start and answer.status != 206:
        _skip(answer, start)  # a server without ranges sends the whole file
    elif rest is not None:
        rest += start
    return Opened(answer, rest, answer.headers.get("ETag"))


def _skip(body: Body, count: int) -> None:
    while count:
        data = body.read(min(count, 1 << 20))
        if not data:
            raise ConnectionError("the file is shorter than before")
        count -= len(data)


def _s3_at(url: str, start: int) -> Opened:
    bucket, key = split_s3(url)
    more: dict[str, Any] = {"Range": f"bytes={start}-"} if start else {}
    with s3_errors():
        answer = s3_client().get_object(Bucket=bucket, Key=key, **more)
    return Opened(answer["Body"], answer["ContentLength"] + start, answer.get("ETag"))


def split_s3(url: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


@contextmanager
def s3_errors() -> Iterator[None]:
    """Tell refusals of an object store, which are Permanent, from errors that may pass."""
    exceptions = need("botocore.exceptions", "stream", "s3://")
    try:
        yield
    except exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        text = f"the object store answers {status} {code}"
        if status >= 500 or status in TEMPORARY_STATUS or code in ("SlowDown", "RequestTimeout"):
            raise ConnectionError(text) from None
        raise Permanent(text) from None
    except (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.ParamValidationError,
        exceptions.NoRegionError,
        exceptions.ProfileNotFound,
    ) as error:
        raise Permanent(one_line(error)) from None


def s3_client() -> Any:
    """The client of this process: connections must not be shared with a fork."""
    return _s3_client(os.getpid())


@cache
def _s3_client(process: int) -> Any:
    boto3 = need("boto3", "stream", "s3://")
    options: dict[str, Any] = {
        "connect_timeout": TIMEOUT,
        "read_timeout": TIMEOUT,
        "retries": {"total_max_attempts": 1},  # RestartingFile has its own
    }
    if boto3.session.Session().get_credentials() is None:
        options["signature_version"] = need("botocore", "stream", "s3://").UNSIGNED  # public data
    return boto3.client("s3", config=need("botocore.config", "stream", "s3://").Config(**options))

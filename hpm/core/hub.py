"""Load weights and data from the Hugging Face hub or its cache, and upload folders."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse
from urllib.request import getproxies

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need

Loaded = TypeVar("Loaded")
CONNECT_TIMEOUT = 3.0  # seconds


def fetched(
    name: str, extra: str, load: Callable[[], Loaded], command: str | None = None
) -> Loaded:
    """Call `load`, offline if the hub cannot be reached, and return its result.

    command: if given, never use the network, and tell the user to download with this command. For
    what only a file names. Raises UserError if it is not available.
    """
    constants: Any = need("huggingface_hub.constants", extra, f"fetching {name}")
    with offline_if_unreachable(always=command is not None) as offline:
        try:
            return load()
        except (OSError, ValueError, RuntimeError) as error:
            text = one_line(error, 160)
    where = f"it was looked for in {constants.HF_HUB_CACHE}"
    if command:
        raise UserError(
            f"{name} is not on disk ({where}), and what only a file names is not downloaded: "
            f"download it with {command}"
        )
    if offline:
        why = f"is not on disk ({where}) and {constants.ENDPOINT} cannot be reached"
    else:
        why = f"cannot be loaded ({where} and at {constants.ENDPOINT}): {text}"
    raise UserError(
        f"{name} {why}; download it on a machine with a network, or pass a local folder"
    )


@contextmanager
def offline_if_unreachable(always: bool = False) -> Iterator[bool]:
    """Keep huggingface_hub to its cache if the hub cannot be reached: it would retry for most of a
    minute. Yields whether it is kept to it. Needs huggingface_hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = bool(always or before or not _reachable(constants.ENDPOINT))
    try:
        yield constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before


def read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """Read a JSON file beside a model's weights. An absent file is an empty dictionary, or an error
    if `needed`.

    Raises UserError.
    """
    if not path.is_file():
        if needed:
            raise UserError(f"{path} is missing: a model's folder needs it")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, one_line(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it has no dictionary")
    return content


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}): repair it, or download the model again")


def push(folder: Path, name: str, public: bool = False) -> str:
    """Upload a folder to the hub as the model USER/NAME, which is created if needed.

    Private unless `public`. Returns its address. Raises UserError if the upload fails.
    """
    hub: Any = need("huggingface_hub", "hf", "--push")
    endpoint = need("huggingface_hub.constants", "hf", "--push").ENDPOINT
    if not _reachable(endpoint):
        raise UserError(f"push: {endpoint} cannot be reached")
    try:
        address = str(hub.create_repo(name, exist_ok=True, private=not public))
        hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Export of hpm")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"push: {name} could not be uploaded: {one_line(error, 160)}") from None
    return address


def _reachable(address: str) -> bool:
    if getproxies():
        return True  # a direct connection would not test the proxy
    parts = urlparse(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT):
            return True
    except OSError:
        return False

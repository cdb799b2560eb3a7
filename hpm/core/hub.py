"""The Hugging Face hub: load weights from its cache or the network, and upload folders."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse
from urllib.request import getproxies

from hpm.core.errors import UserError, one_line
from hpm.core.extras import need

Loaded = TypeVar("Loaded")
SECONDS = 3.0


def fetched(
    name: str, extra: str, load: Callable[[], Loaded], only_by: str | None = None
) -> Loaded:
    """What `load` returns. Raises UserError if the weights are neither on disk nor available.

    only_by: the command by which the user fetches the weights; given where only a file of weights
    names them. Then they are taken from the disk, and the network is left alone.
    """
    constants: Any = need("huggingface_hub.constants", extra, f"fetching {name}")
    before = constants.HF_HUB_OFFLINE
    # Without a network the library would try again for most of a minute.
    constants.HF_HUB_OFFLINE = bool(only_by or before or not _reachable(constants.ENDPOINT))
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:
        where = f"it was looked for in {constants.HF_HUB_CACHE}"
        if only_by:
            raise UserError(
                f"{name} is not on disk ({where}), and models that only a file names are not "
                f"downloaded: download it with {only_by}"
            ) from None
        if constants.HF_HUB_OFFLINE:
            why = f"is not on disk ({where}) and {constants.ENDPOINT} cannot be reached"
        else:
            why = f"cannot be loaded ({where} and at {constants.ENDPOINT}): {one_line(error, 160)}"
        raise UserError(
            f"{name} {why}; download it on a machine with a network, or pass a local folder"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = before


def read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """What stands beside a model's weights; nothing where there is no such file, unless needed.

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
    """Upload a folder as the model USER/NAME, made where there is none, private unless it is to be
    `public`. Returns its address.

    Raises UserError where the hub cannot be reached or does not accept it.
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
        return True  # what a direct connection says would mean nothing
    parts = urlparse(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname, port), timeout=SECONDS):
            return True
    except OSError:
        return False

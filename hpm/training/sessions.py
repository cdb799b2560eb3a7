"""Record the sessions of a run in sessions.jsonl: when, on what machine, and why each one ended.

A run that is resumed has several sessions. A session that was killed has no end.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpm.core import distributed
from hpm.core.version import __version__

FILE = "sessions.jsonl"
FINISHED = "finished"
TIME = "%Y-%m-%d %H:%M:%S"


@dataclass
class Session:
    """One uninterrupted part of a training."""

    began: str
    first_step: int
    total_steps: int
    environment: dict[str, Any] = field(default_factory=dict)
    ended: str | None = None  # None if it is running or was killed
    last_step: int | None = None
    reason: str | None = None
    failed: bool = False  # ended by an error rather than a signal


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that results may depend on."""
    on_gpu = device.type == "cuda"
    return {
        "hpm": __version__,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda if on_gpu else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(sys.argv),
    }


def begin(folder: Path, step: int, total_steps: int, device: torch.device) -> None:
    """Record that training starts or resumes at this step."""
    _append(
        folder,
        {
            "event": "begin",
            "time": _now(),
            "step": step,
            "total_steps": total_steps,
            "environment": environment(device),
        },
    )


def end(folder: Path, step: int, reason: str, failed: bool = False) -> None:
    """Record that training ended at this step, why, and whether by an error."""
    _append(
        folder,
        {
            "event": "end",
            "time": _now(),
            "step": step,
            "reason": reason,
            "failed": failed,
        },
    )


def read_sessions(folder: Path) -> list[Session]:
    """All sessions, oldest first; empty for runs of versions that did not record them."""
    sessions: list[Session] = []
    for line in read_lines(folder / FILE):
        with contextlib.suppress(KeyError):  # written by another version
            if line["event"] == "begin":
                sessions.append(
                    Session(line["time"], line["step"], line["total_steps"], line["environment"])
                )
            elif sessions:
                last = sessions[-1]
                last.ended, last.last_step, last.reason = line["time"], line["step"], line["reason"]
                last.failed = line.get("failed", False)
    return sessions


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, skipping lines that a killed process left incomplete."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = json.loads(line, object_pairs_hook=_sharing_names)
                if isinstance(value, dict):
                    yield value


def _sharing_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The names are the same in each line, and take more memory than the numbers."""
    return {sys.intern(name): value for name, value in pairs}


def _append(folder: Path, event: dict[str, Any]) -> None:
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _now() -> str:
    return time.strftime(TIME)


def _processor() -> str:
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"

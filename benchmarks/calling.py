"""Run a command of `hpm` from a benchmark that stops when its time is up and goes on later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def call(command: list[str], log: Path, end: float) -> bool:
    """Run `hpm` in one thread until `end`, of time.monotonic(). Returns False if the time was up;
    raises SystemExit on failure. log: file that the output is added to."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "hpm", *command],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            code = process.wait(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return False
    if code:
        raise SystemExit(f"hpm {command[0]} failed; see {log}")
    return True

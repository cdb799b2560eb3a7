"""Commands that start processes of their own, which end with the test whatever happens."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "HPM_TEST_JOB"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Job:
    """A Python command and all processes that it starts, found by their environment: torchrun
    gives each of its processes a session of its own."""

    def __init__(self, *command):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", MARK: self.mark},
        )

    def members(self) -> list[int]:
        """Processes of the job that are alive."""
        found, mark = [], f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(folder.name)
                # A zombie's environment is empty.
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(pid)
        return found

    def wait_until(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal_all(self, number):
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def errors(self, timeout=120) -> str:
        """What it wrote to stderr, once it has ended."""
        return self.process.communicate(timeout=timeout)[1]

    def all_gone(self, seconds=20):
        deadline = time.monotonic() + seconds
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.members()

    def end(self):
        """Kill what is left of it: a process that hangs would keep the pipe of stderr open."""
        if Path("/proc/self/environ").exists():
            self.signal_all(signal.SIGKILL)
        self.process.kill()
        self.process.communicate(timeout=60)


def torchrun(*command, processes=2, timeout=240) -> subprocess.CompletedProcess:
    """A Python command (`-m hpm ...` or a file) in several processes; none of them is left."""
    job = Job(*TORCHRUN, processes, *command)
    try:
        errors = job.errors(timeout)
    finally:
        job.end()
    return subprocess.CompletedProcess(command, job.process.returncode, "", errors)

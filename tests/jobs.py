"""Commands that start processes of their own, which end with the test whatever happens."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import torch.distributed as dist
from helpers import HANGS

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

    def wait_until(self, condition, seconds=HANGS, alive=True):
        """alive: the command itself has to go on until then; else what it has started."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not alive or self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal_all(self, number):
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def errors(self, timeout=HANGS) -> str:
        """What it wrote to stderr, once it has ended."""
        return self.process.communicate(timeout=timeout)[1]

    def all_gone(self, seconds=120):
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


def torchrun(*command, processes=2) -> subprocess.CompletedProcess:
    """A Python command (`-m hpm ...` or a file) in several processes; none of them is left."""
    job = Job(*TORCHRUN, processes, *command)
    try:
        errors = job.errors()
    finally:
        job.end()
    return subprocess.CompletedProcess(command, job.process.returncode, "", errors)


# Its processes are forked from one that has imported what commands need.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "hpm.pretraining",
        "hpm.evals.knn",
        "hpm.weights.shard_writer",
        "torch.utils.tensorboard.writer",
    ]
)


def hpm_on(count, *arguments) -> subprocess.CompletedProcess:
    """`hpm ARGUMENTS` in processes that find each other as those of torchrun do, but start in a
    tenth of its time. What torchrun does when one of them fails is not done."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "stderr")
        processes = []
        try:
            for rank in map(str, range(count)):
                environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
                process = FORKS.Process(target=_run_hpm, args=(words, environment, str(file)))
                process.start()
                processes.append(process)
            deadline = time.monotonic() + HANGS
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
            assert not any(process.is_alive() for process in processes), file.read_text()
        finally:
            for process in processes:
                process.kill()
                process.join()
        code = max(abs(process.exitcode) for process in processes)
        return subprocess.CompletedProcess(words, code, "", file.read_text())


def _run_hpm(arguments, environment, stderr):
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from hpm.commands.cli import main

    sys.exit(main(arguments))

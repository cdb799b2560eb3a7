"""Trainings in processes that are killed, and how often: at a random time, or at a random moment of
writing a file."""

import multiprocessing
import os
import random
import signal
import socket
import threading
from multiprocessing import connection

# Forks of a process that has imported everything: they start in a tenth of the time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hpm.pretraining", "hpm.weights.shard_writer"])
GRACE = 10.0  # seconds to notice that another process has been killed
MOST_SAVES = 3  # of a training that is to be killed
LONGEST = 2.0  # seconds
CALLS = 8  # system calls of which one is the last


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def train(options: dict, seed: int | None, rank: int, world_size: int, port: int) -> None:
    """Train; with a seed, until the kill that it stands for."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    import torch

    import hpm

    torch.set_num_threads(1)
    if seed is not None:
        _arm(random.Random(seed))
    hpm.pretrain(**options)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(rng: random.Random) -> None:
    """One of four dies at a time that is drawn, from its start on; the others from a checkpoint on
    that is drawn, at a system call of writing it, or some milliseconds later. The next checkpoint
    is never written."""
    from hpm.training.run import PretrainingRun

    save, saves, last = PretrainingRun.save, [], rng.randrange(MOST_SAVES)
    if rng.random() < 0.25:
        _after(rng.uniform(0, LONGEST))

    def counted(run) -> None:
        if len(saves) == last:
            if rng.random() < 0.5:
                _at_call(rng.randrange(CALLS), before=rng.random() < 0.5)
            else:
                _after(rng.uniform(0, 0.05))
        if len(saves) > last:
            kill()
        saves.append(run.step)
        save(run)

    PretrainingRun.save = counted


def _after(seconds: float) -> None:
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()


def _at_call(last: int, before: bool) -> None:
    calls = []
    for name in ("fsync", "replace", "unlink"):
        call = getattr(os, name)

        def counted(*arguments, call=call, **options):
            calls.append(call)
            if before and len(calls) > last:
                kill()
            result = call(*arguments, **options)
            if len(calls) > last:
                kill()
            return result

        setattr(os, name, counted)


def start(options: dict, seed: int | None = None, world_size: int = 1) -> list:
    """The processes of a training, one of which is to be killed if there is a seed."""
    port = free_port() if world_size > 1 else 0
    started = []
    for rank in range(world_size):
        own = seed if seed is not None and rank == seed % world_size else None
        arguments = (options, own, rank, world_size, port)
        started.append(CONTEXT.Process(target=train, args=arguments))
        started[-1].start()
    return started


def codes(processes: list, seconds: float = 900) -> list[int]:
    """Their exit codes, once all have ended. As torchrun does, kills those that wait for a process
    that has been killed."""
    try:
        sentinels = [process.sentinel for process in processes]
        connection.wait(sentinels, seconds)
        killed = any(process.exitcode not in (None, 0) for process in processes)
        for process in processes:
            process.join(GRACE if killed else seconds)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [process.exitcode for process in processes]

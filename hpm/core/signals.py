"""Save and stop on SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """The run was stopped by `signal_number` and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__("stopped and saved; run the same command again to resume")
        self.signal_number = signal_number


class Stop:
    """The stop signal that was received; 0 for none."""

    received = 0


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore_stop_signals(*_: object) -> None:
    """Ignore stop signals in a data loading worker. Schedulers signal every process of a job, and a
    dead worker would end the run before it has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def hold_stop_signals() -> Iterator[None]:
    """Block stop signals inside the context. Processes started in it inherit the blocked signals,
    so that data loading workers can ignore them in time."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Record SIGTERM, SIGUSR1 (which some schedulers send before a time limit) and Ctrl-C for the
    training loop. A second Ctrl-C raises KeyboardInterrupt at once."""
    stop = Stop()

    def receive(number: int, frame: Any) -> None:
        if stop.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.received = number

    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python allows signal handlers in the main thread only
        return
    before = {n: signal.signal(n, receive) for n in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

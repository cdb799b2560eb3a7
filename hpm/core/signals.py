"""Save and stop on SIGTERM, SIGUSR1 and Ctrl-C, or when the time is up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """The run was stopped by `signal_number` and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__("stopped and saved; run the same command again to resume")
        self.signal_number = signal_number


class Stop:
    """Whether to stop: because of a signal, or because the time is up.

    after: seconds from now, if the time is limited. clock: seconds, for tests.
    """

    def __init__(self, after: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.signal = 0
        self._clock = clock
        self._end = None if after is None else clock() + after

    @property
    def received(self) -> int:
        """The signal that was received; SIGTERM if the time is up; 0 for none."""
        if self.signal == 0 and self._end is not None and self._clock() >= self._end:
            return signal.SIGTERM
        return self.signal


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
def stop_signals(
    after: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Stop]:
    """Record SIGTERM, SIGUSR1 (which some schedulers send before a time limit) and Ctrl-C for the
    training loop. A second Ctrl-C raises KeyboardInterrupt at once.

    after: seconds after which to stop in any case. clock: seconds, for tests.
    """
    stop = Stop(after, clock)

    def receive(number: int, frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python allows signal handlers in the main thread only
        return
    before = {n: signal.signal(n, receive) for n in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

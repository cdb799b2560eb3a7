"""What a report says of a run's state and time."""

import time

import pytest

from hpm.core import lock
from hpm.show.status import read_status
from hpm.training.sessions import TIME, Session

NOW = 1_800_000_000.0


def text(ago):
    return None if ago is None else time.strftime(TIME, time.localtime(NOW - ago))


def session(began, first, ended=None, last=None, reason=None, failed=False):
    """Times in seconds before now."""
    return Session(text(began), first, 100, {}, text(ended), last, reason, failed)


def status(folder, *sessions, steps=(), **options):
    speed = {"images_per_second": 10.0}
    metrics = [{"step": step} | speed for step in steps]
    return read_status(folder, {"batch_size": 10} | options, metrics, sessions, NOW)


def test_finished(tmp_path):
    found = status(tmp_path, session(100, 0, 40, 100, "finished"), steps=[50, 100])
    assert (found.state, found.words) == ("finished", "step 100 of 100, finished")
    assert found.elapsed == pytest.approx(60)
    assert found.times == "took 1 min" and found.left is None


def test_stopped_then_resumed_and_failed(tmp_path):
    first = session(500, 0, 400, 30, "by SIGTERM, saved")
    assert status(tmp_path, first, steps=[30]).state == "stopped"
    second = session(300, 30, 250, 44, "ValueError: x", failed=True)
    found = status(tmp_path, first, second, steps=[30])
    assert (found.state, found.step) == ("failed", 44), "it failed after the last reading"
    assert found.elapsed == pytest.approx(150)


def test_running_only_while_a_process_holds_the_folder(tmp_path):
    alone = session(80, 0)
    assert status(tmp_path, alone, steps=[40]).state == "stopped", "killed"
    lock.acquire(tmp_path)
    try:
        found = status(tmp_path, alone, steps=[20, 40])
        assert found.state == "running"
        assert found.elapsed == pytest.approx(80)
        assert found.left == pytest.approx(120), "40 steps in 80 seconds, 60 are left"
        assert "so far" in found.times and "left" in found.times
    finally:
        lock.release(tmp_path)


def test_a_killed_session_counts_by_its_readings(tmp_path):
    killed, last = session(1000, 0), session(100, 40, 90, 100, "finished")
    found = status(tmp_path, killed, last, steps=[20, 40, 100])
    assert found.elapsed == pytest.approx(40 + 10), "40 steps of a second, and 10 seconds"


def test_runs_of_versions_without_sessions(tmp_path):
    assert status(tmp_path, steps=[100]).state == "stopped"
    found = read_status(tmp_path, {"steps": 100}, [{"step": 100}], [])
    assert (found.state, found.times) == ("finished", "")
    assert read_status(tmp_path, {}, [], []).words == "step 0, stopped"


def test_many_killed_sessions_do_not_each_read_the_whole_log(tmp_path):
    class Line(dict):
        read = 0

        def __getitem__(self, name):
            Line.read += name == "step"
            return super().__getitem__(name)

    lines = [Line(step=step, images_per_second=10.0) for step in range(1, 1001)]
    killed = [session(9000, first) for first in range(0, 1000, 20)]
    last = session(100, 1000, 90, 1000, "finished")
    found = read_status(tmp_path, {"batch_size": 10}, lines, [*killed, last], NOW)
    assert found.elapsed == pytest.approx(1000 + 10) and Line.read < 10 * len(lines)

"""The progress bar, on a terminal of 80 columns."""

import io
import re

import pytest
from rich.console import Console

from hpm.core import progress
from hpm.training.log import RunLog

STATUS = "loss 0.4123  ranking 0.812  12345 images/s  data wait 12 %  123.4 GB"


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal of 80 columns."""
    written = io.StringIO()
    options = {"force_terminal": True, "width": 80, "color_system": None, "_environ": {}}
    monkeypatch.setattr(
        progress, "Console", lambda **given: Console(**given | options | {"file": written})
    )
    return written


def test_the_bar_shows_step_numbers_and_time_left_in_80_columns(terminal, tmp_path):
    log = RunLog(tmp_path, 0, 1_000_000, active=True)
    log.progress(123_456, STATUS, 60.0)
    before = len(terminal.getvalue())
    log._progress.refresh()
    shown = re.sub(r"\x1b\[\S*?[A-Za-z]", "", terminal.getvalue()[before:])
    log.close()
    lines = shown.replace("\r", "").splitlines()
    assert all(len(line) <= 80 for line in lines)
    bar, status = lines
    assert "123456/1000000" in bar and re.search(r"left [-\d]+(:[-\d]{2}){2}$", bar.strip())
    assert status.strip() == STATUS


def test_a_finished_bar_leaves_the_screen(terminal, tmp_path):
    log = RunLog(tmp_path, 0, 10, active=True)
    log.progress(10, STATUS, 0.0)
    before = len(terminal.getvalue())
    log.close()
    after = terminal.getvalue()[before:]
    # Each of its two lines is erased, and nothing is written after that.
    erase_line = "\x1b[1A\x1b[2K"
    assert after.endswith(2 * erase_line)

"""The experiment runs through, from tuning to table, on a few images."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence.py"


@pytest.mark.slow
def test_a_piece_of_the_experiment(shared_data, tmp_path):
    """Stopped and started again; a seed of HPM with its objects comes out."""
    results = tmp_path / "results.json"
    command = [
        sys.executable,
        SCRIPT,
        "--smoke",
        "--rows",
        "600",
        "--epochs",
        "1",
        "--side-by-side",
        "2",
        "--data",
        shared_data / "tin100",
        "--out",
        tmp_path / "runs",
        "--results",
        results,
    ]
    piece = subprocess.run([*command, "--minutes", "0.5"], capture_output=True, text=True)
    assert piece.returncode == 0, piece.stderr
    known = {}
    with subprocess.Popen([*command, "--minutes", "60"], start_new_session=True) as process:
        while process.poll() is None and "HPM / seed 0" not in known:
            time.sleep(1)
            known = json.loads(results.read_text()) if results.exists() else {}
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert 0 <= known["MAE / seed 0"]["linear"] <= 100
    objects = known["HPM / seed 0"]["objects"]
    assert len(objects["mined"]) == len(objects["progress"]) > 1
    assert all(0 < share < 1 for share in [objects["chance"], *objects["mined"]])

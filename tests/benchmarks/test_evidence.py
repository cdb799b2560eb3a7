"""The experiment runs through, from tuning to table, on a few images."""

import json
import subprocess
import sys
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
    for _ in range(8):
        piece = subprocess.run([*command, "--minutes", "1"], capture_output=True, text=True)
        assert piece.returncode == 0, piece.stderr
        known = json.loads(results.read_text())
        if "HPM / seed 0" in known:
            break
    assert 0 <= known["MAE / seed 0"]["linear"] <= 100
    objects = known["HPM / seed 0"]["objects"]
    assert len(objects["mined"]) == len(objects["progress"]) > 1
    assert all(0 < share < 1 for share in [objects["chance"], *objects["mined"]])

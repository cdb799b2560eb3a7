"""The experiment on clips: each clip is tested once, and its report tells the pairs apart."""

import argparse
import sys
from pathlib import Path

import pytest


@pytest.fixture
def video(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import video

    yield video
    sys.modules.pop("video")


@pytest.mark.slow
def test_each_clip_is_tested_once(video, shared_data, tmp_path):
    tested = []
    for seed in range(video.SEEDS):
        train, test = video.write_fold(shared_data / "fight128", seed, tmp_path)
        ours, others = (path.read_text().splitlines() for path in (test, train))
        assert not set(ours) & set(others) and len(ours) + len(others) == 300
        assert sum(line.endswith(" fight") for line in ours) == 50 == len(ours) / 2
        street = {"fi115", "fi121", "nofi050"}  # one scene
        assert street & {Path(line.split()[0]).stem for line in ours} in (street, set())
        tested += ours
    assert len(set(tested)) == len(tested) == 300


def test_the_report(video, tmp_path, monkeypatch):
    def probes(trained, other):
        rows = {"trained": trained, "random weights": other, "raw pixels": 50.0}
        linear = {
            f"{name}, {kind}": v
            for name, v in rows.items()
            for kind in ("class token", "patch mean")
        }
        linear |= {"raw pixels": 50.0}
        return {"linear": linear, "attentive": rows, "minutes": 2.0}

    def over_frames(found):
        names = {p: {f"{n}, mean of frames": v for n, v in found[p].items()} for p in video.PROBES}
        return found | names

    arms = {"HPM": 60.0, "random tubes": 58.0, "frames": 65.0}
    known = {
        arm: {str(seed): probes(base + seed, 55.0) for seed in range(2)}
        for arm, base in arms.items()
    }
    known["frames"] = {seed: over_frames(found) for seed, found in known["frames"].items()}
    monkeypatch.setattr(video, "keep", lambda chosen: known)
    written = {}
    monkeypatch.setattr(video, "write_section", lambda name, text: written.update({name: text}))
    video.report(argparse.Namespace())
    rows = [line.split(" | ") for line in written["video"].splitlines() if line.startswith("| ")]
    rows = {row[0].strip("| "): [cell.strip(" |") for cell in row[1:]] for row in rows}
    assert rows["HPM minus random tubes"] == ["+2.0 ± 0.0"]  # of the last table, attentive
    assert rows["HPM minus frames, pooled"] == ["-5.0 ± 0.0"]
    assert rows["raw pixels"] == ["50.0 ± 0.0"]
    text = written["video"]
    assert "| linear probe, top-1 in % | class token | patch mean |" in text
    assert "| frames, pooled | 65.5 ± 0.7 | 65.5 ± 0.7 |" in text

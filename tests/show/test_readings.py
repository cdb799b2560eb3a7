import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpm.show import readings
from hpm.show.readings import read_metrics
from hpm.weights.run_folder import latest_values, training_minutes

BATCH = 64


def write(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def log(losses, every=10, evaluated=7):
    """Lines of training, and after some an evaluation at the same step."""
    lines = []
    for number, loss in enumerate(losses, 1):
        line = {"step": every * number, "loss": loss, "images_per_second": 100 + number % 13}
        lines.append(line)
        if number % evaluated == 0:
            lines.append({"step": every * number, "held_out/loss": loss / 2})
    return lines


def test_a_short_log_is_read_whole(tmp_path):
    lines = log([3.0, 2.0, 1.0] * 50)
    write(tmp_path, [*lines, {"no": "step"}])
    assert read_metrics(tmp_path) == lines
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("count", [12_000, 40_000])
def test_of_a_long_log_a_few_thousand_lines_are_kept(tmp_path, count):
    lines = log([1 / number for number in range(1, count)], evaluated=1000)
    lines[count // 2]["loss"] = 77.0  # a spike
    write(tmp_path, lines)
    found = read_metrics(tmp_path)
    assert len(found) < 5000
    assert max(line.get("loss", 0) for line in found) == 77


@given(
    st.lists(st.floats(0, 1e6) | st.just(float("nan")), min_size=21, max_size=150),
    st.integers(1, 9),
)
@example([1.0] * 21 + [float("nan")], 2)  # the last group is an evaluation alone
def test_what_a_long_log_tells_stays_the_same(tmp_path_factory, losses, evaluated):
    lines, folder = log(losses, evaluated=evaluated), tmp_path_factory.mktemp("run")
    write(folder, lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, "MAX_LINES", 20)
        patch.setattr(readings, "GROUPS", 4)
        found = read_metrics(folder)
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)
    assert evaluations(found) == evaluations(lines)
    for extreme in (min, max):
        assert extreme(finite(found)) == extreme(finite(lines))
    assert latest_values(found) == pytest.approx(latest_values(lines), nan_ok=True)
    assert training_minutes(found, BATCH) == pytest.approx(training_minutes(lines, BATCH))


def evaluations(lines):
    return [line["step"] for line in lines if "held_out/loss" in line]


def finite(lines):
    """Losses of training, or nothing but zero."""
    return [line["loss"] for line in lines if line.get("loss", float("nan")) >= 0] or [0.0]

"""What is said of the held-out images while a run trains."""

from hpm.show import monitor
from hpm.show.monitor import in_words

MEASURES = {
    "reconstruction_loss": 0.7591,
    "ranking_accuracy": 0.6923,
    "rank_correlation": 0.539,
    "mining_accuracy": 0.6121,
    "mining_correlation": 0.309,
}


def test_measures_are_a_short_row():
    row = in_words(MEASURES)
    assert row == "loss 0.759, ranking accuracy 0.692 (teacher 0.612; 0.5 is chance)"
    on_objects = in_words(MEASURES | {"hard_on_objects": 0.316, "chance_on_objects": 0.195})
    assert on_objects == f"{row}, hardest patches on objects 32 % (20 % by chance)"
    assert in_words({"reconstruction_loss": 0.7591}) == "loss 0.759"


def test_a_slow_report_is_written_rarely(monkeypatch):
    now, takes, written = [0.0], [0.5], []
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])

    def write():
        now[0] += takes[0]
        written.append(now[0])

    report = monitor.seldom(write)
    for _ in range(5):
        report()
        now[0] += 1
    assert len(written) == 5, "a quick one each time"
    takes[0] = 4.0
    start = now[0]
    for _ in range(2000):
        report()
        now[0] += 1
    assert 5 <= len(written) - 5 <= 11 and 4.0 * (len(written) - 5) < 0.025 * (now[0] - start)

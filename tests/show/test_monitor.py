"""What is said of the held-out images while a run trains."""

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

"""The sentence of a report says what the numbers say, and no more."""

import math
from pathlib import Path

import pytest

from hpm.evals.saved import Row, Saved
from hpm.show.judgement import judge, references

MINES = {"target": "normalized_pixels", "mask": "easy_to_hard", "predictor_loss": "relative"}
MAE = {"target": "normalized_pixels", "mask": "random", "predictor_loss": "none"}


def at_end(**values):
    """Metrics of a run of 100 steps with these as its last held-out measures."""
    held_out = {f"held_out/{name}": value for name, value in values.items()}
    return [
        {"step": 1, "reconstruction_loss": 1.3},
        {"step": 100, "reconstruction_loss": 1.2} | held_out,
    ]


def saved(**top1):
    rows = [
        Row("linear", "flowers", name, {"top1": v, "top1_low": v - 2, "top1_high": v + 2})
        for name, v in ((n.replace("_", " "), v) for n, v in top1.items())
    ]
    return Saved(Path("x.json"), "student", 100, rows)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (1.2, "Loss 1.20 on held-out images (1.0 is predicting the mean): has learned nothing yet"),
        (1.01, "Loss near 1.0 (1.01 on held-out images): has barely learned"),
        (0.98, "Loss near 1.0 (0.980 on held-out images): has barely learned"),
        (0.93, "has begun to learn"),
        (0.7, "Loss 0.700 on held-out images (1.0 is predicting the mean): reconstructs what is"),
    ],
)
def test_the_loss_beside_that_of_predicting_the_mean(loss, words):
    assert words in judge(MAE, at_end(reconstruction_loss=loss), [], 100)


def test_raw_pixels_claim_less_and_only_where_their_scale_is_known():
    metrics = at_end(reconstruction_loss=0.5)
    raw = MAE | {"target": "pixels", "normalize": "measured"}
    assert "reconstructs colour and brightness at least" in judge(raw, metrics, [], 100)
    assert "predicting the mean" not in judge(raw | {"normalize": "imagenet"}, metrics, [], 100)


def test_targets_without_a_scale_are_judged_by_their_fall():
    hog = MAE | {"target": "hog"}
    metrics = [
        {"step": 50, "reconstruction_loss": 0.1, "held_out/reconstruction_loss": 0.2},
        {"step": 100, "reconstruction_loss": 0.1, "held_out/reconstruction_loss": 0.05},
    ]
    assert "Loss 0.0500 on held-out images: has fallen since the first reading (0.200)" in judge(
        hog, metrics, [], 100
    )
    metrics[1]["held_out/reconstruction_loss"] = 0.199
    assert "has not fallen" in judge(hog, metrics, [], 100)


def test_a_loss_above_a_thousand():
    raw = MAE | {"target": "pixels", "normalize": "imagenet"}
    metrics = [{"step": step, "reconstruction_loss": 2345.6} for step in (1, 100)]
    assert "Loss 2,346: has not fallen" in judge(raw, metrics, [], 100)


def test_an_evaluation_before_the_first_reading_of_the_training():
    metrics = [{"step": 1, "held_out/reconstruction_loss": 1.2}]
    assert (
        judge(MAE, metrics, [], 100)
        == "Too early to judge: the learning rate still rises; loss 1.20."
    )


def test_the_loss_of_mined_masks_alone_is_no_verdict():
    metrics = [{"step": 100, "reconstruction_loss": 1.0, "ranking_accuracy": 0.8}]
    sentence = judge(MINES, metrics, [], 100)
    assert "1.00 on mined masks, which are harder than random ones" in sentence
    assert "barely" not in sentence
    assert "barely learned" in judge(MAE, metrics, [], 100)


@pytest.mark.parametrize(
    ("ranking", "mining", "words"),
    [
        (
            0.5,
            0.5,
            "does not tell hard patches from easy ones (ranking accuracy 0.500, teacher 0.500",
        ),
        (0.57, 0.55, "begins to tell hard patches from easy ones"),
        (
            0.8,
            0.75,
            "tells hard patches from easy ones (ranking accuracy 0.800, teacher 0.750; 0.5 ",
        ),
        (0.8, 0.5, "tells hard patches from easy ones, but the teacher, which mines, does not"),
        (0.8, 0.3, "tells hard patches from easy ones, but mining hides easy ones"),
    ],
)
def test_the_predictor_and_the_teacher(ranking, mining, words):
    metrics = at_end(reconstruction_loss=0.7, ranking_accuracy=ranking, mining_accuracy=mining)
    assert words in judge(MINES, metrics, [], 100)


@pytest.mark.parametrize("options", [{"mask": "random"}, {"mine_by": "memory"}])
def test_a_teacher_that_does_not_mine_is_not_spoken_of(options):
    metrics = at_end(reconstruction_loss=0.7, ranking_accuracy=0.8, mining_accuracy=0.3)
    sentence = judge(MINES | options, metrics, [], 100)
    assert "teacher" not in sentence and "tells hard patches from easy ones" in sentence


def test_no_predictor_no_words_on_it():
    assert "patches" not in judge(MAE, at_end(reconstruction_loss=0.7), [], 100)


def test_features_beside_random_weights_and_raw_pixels():
    metrics = at_end(reconstruction_loss=0.7)
    values = {
        "trained,_patch_mean": 30,
        "trained,_class_token": 28,
        "random_weights,_patch_mean": 20,
    }
    sentence = judge(MAE, metrics, [saved(**values, raw_pixels=31)], 100)
    assert "linear probe on flowers 30.0" in sentence
    assert "above random weights (20.0" in sentence
    assert "no different from raw pixels (31.0" in sentence
    sentence = judge(MAE, metrics, [saved(**values, raw_pixels=50)], 100)
    assert "below raw pixels (50.0" in sentence
    teacher = saved(**values)
    teacher.weights = "teacher"
    for none in ([], [teacher], [Saved(Path("broken.json"), None, None, None)]):
        assert "its features are not evaluated yet" in judge(MAE, metrics, none, 100)


def test_the_evaluation_that_tells_most_is_spoken_of():
    found = saved(trained=40, random_weights=20)
    found.rows += [
        Row("linear", "flowers", "trained", {"top1": 10.0}, "frame stride 0"),
        Row("knn, k = 20", "flowers", "trained", {"top1": 90.0}),
    ]
    found.rows.insert(0, found.rows.pop(-2))  # the order of the files does not matter
    sentence = judge(MAE | {"frames": 8}, at_end(reconstruction_loss=0.7), [found], 100)
    assert "on held-out clips" in sentence
    assert "linear probe on flowers 40.0\u00a0%, above random weights (20.0" in sentence


def test_before_there_is_something_to_judge():
    assert judge(MAE, [], [], 100) == "No measurements yet."
    early = judge(MAE, [{"step": 5, "reconstruction_loss": 1.3}], [], 100)
    assert early.startswith("Too early to judge") and "1.3" in early
    assert "not finite" in judge(MAE, [{"step": 90, "reconstruction_loss": math.nan}], [], 100)
    assert "not evaluated" not in judge(MAE, at_end(reconstruction_loss=0.7), [], 200)


def test_references_depend_on_target_and_predictor():
    assert references(MINES)["predictor_loss"].value == pytest.approx(math.log(2))
    assert references(MINES | {"predictor_loss": "absolute"})["predictor_loss"].value == 1
    assert "predictor_loss" not in references(MAE)
    assert references(MAE)["held_out/reconstruction_loss"].value == 1
    for target in ("hog", "teacher", "tokens", "my_module:Mine"):
        assert "reconstruction_loss" not in references(MAE | {"target": target})
    assert references(MAE)["ranking_accuracy"].value == 0.5


def test_an_evaluation_before_the_run_was_prolonged_says_its_step():
    before, now = saved(trained=40.0), saved(trained=30.0)
    before.step = 50
    assert "linear probe on flowers 40.0\u00a0% at step 50" in judge(MAE, at_end(), [before], 100)
    told = judge(MAE, at_end(), [before, now], 100)
    assert "linear probe on flowers 30.0" in told and "at step" not in told

"""One sentence on what a run has learned, from its losses, ranking accuracies and evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hpm.core.choices import HARD_SHARES
from hpm.core.wording import of_clips, sample_word
from hpm.evals.contract import RANDOM, RAW_PIXELS, TRAINED
from hpm.evals.saved import Row, Saved
from hpm.show.curves import Reference, number
from hpm.weights.run_folder import latest_values

HELD_OUT = "held_out/"
LOSS, PREDICTOR = "reconstruction_loss", "predictor_loss"
RANKING, MINING = "ranking_accuracy", "mining_accuracy"
EARLY = 0.1  # of the training: until then the learning rate still rises
BARELY, BEGUN = 0.97, 0.9  # of the loss of predicting the mean
CHANCE, CLEAR = 0.52, 0.6  # ranking accuracies: below, by chance; from there on, no doubt
READINGS = 3  # of the training loss, whose mean is its latest value
# The evaluation to speak of, if there are several.
PREFERRED = ("linear", "attentive", "knn, k = 20", "knn", "finetune")


def references(options: dict[str, Any]) -> dict[str, Reference]:
    """The references of the metrics of a run, by name. Targets whose loss has no natural scale have
    none for the loss."""
    found = {
        name: Reference(0.5, "0.5 is chance")
        for name in (RANKING, HELD_OUT + RANKING, HELD_OUT + MINING)
    }
    for name in ("rank_correlation", "mining_correlation"):
        found[HELD_OUT + name] = Reference(0.0, "0 is chance")
    target = options.get("target", "normalized_pixels")
    # Raw pixels have variance 1 if they are normalised by their own statistics.
    measured = options.get("normalize", "auto") in ("auto", "measured")
    if target in ("normalized_pixels", "normalized_channels") or (target == "pixels" and measured):
        mean = Reference(1.0, "1.0 is predicting the mean")
        found |= {LOSS: mean, HELD_OUT + LOSS: mean}
    if options.get("predictor_loss") == "relative":
        found[PREDICTOR] = Reference(math.log(2), "0.693 is chance")
    elif options.get("predictor_loss") == "absolute":
        found[PREDICTOR] = Reference(1.0, "1.0 is predicting the mean")
    return found


def judge(
    options: dict[str, Any],
    metrics: list[dict[str, Any]],
    evaluations: Sequence[Saved],
    total: int | None,
) -> str:
    """The sentence. total: steps of the whole training, None if unknown."""
    last = latest_values(metrics)
    if LOSS not in last and HELD_OUT + LOSS not in last:
        return "No measurements yet."
    if total and last["step"] < EARLY * total:
        value = _loss(metrics) if LOSS in last else last[HELD_OUT + LOSS]
        return f"Too early to judge: the learning rate still rises; loss {number(value)}."
    parts = [
        _reconstruction(options, metrics, last),
        _predictor(options, last),
        _features(evaluations, last, finished=last["step"] == total),
    ]
    sentence = "; ".join(filter(None, parts))
    return f"{sentence[0].upper()}{sentence[1:]}."


def _reconstruction(
    options: dict[str, Any], metrics: list[dict[str, Any]], last: dict[str, Any]
) -> str:
    """Of the loss on held-out images with random masks if it is known: masks that mine are harder,
    so that the loss of training may rise while the model learns."""
    held_out = last.get(HELD_OUT + LOSS)
    if held_out is None and options.get("mask") in HARD_SHARES:
        loss = number(_loss(metrics))
        return f"loss {loss} on mined masks, which are harder than random ones"
    value = _loss(metrics) if held_out is None else held_out
    where = "" if held_out is None else f" on held-out {sample_word(of_clips(options))}s"
    if not math.isfinite(value):
        return "the loss is not finite: nothing can be learned from here on"
    reference = references(options).get(LOSS)
    if reference is None:
        return _fall(metrics, HELD_OUT + LOSS if held_out is not None else LOSS, where)
    share, shown = value / reference.value, number(value)
    if BARELY <= share <= 2 - BARELY:
        return f"loss near 1.0 ({shown}{where}): has barely learned"
    if share > 1:
        verdict = "has learned nothing yet"
    elif share >= BEGUN:
        verdict = "has begun to learn"
    elif options.get("target") == "pixels":  # the mean colour of visible neighbours is enough
        verdict = "reconstructs colour and brightness at least"
    else:
        verdict = "reconstructs what is hidden"
    return f"loss {shown}{where} ({reference.name}): {verdict}"


def _fall(metrics: list[dict[str, Any]], name: str, where: str) -> str:
    """How far a loss without a reference has come."""
    values = [line[name] for line in metrics if name in line]
    first, latest = values[0], values[-1]
    if len(values) == 1:
        return f"loss {number(latest)}{where}, which has no scale of its own"
    fell = "has not fallen" if latest > BARELY * first else "has fallen"
    return f"loss {number(latest)}{where}: {fell} since the first reading ({number(first)})"


def _predictor(options: dict[str, Any], last: dict[str, Any]) -> str:
    """Whether the predictor orders hidden patches, and the teacher those of whole images."""
    ranking = last.get(HELD_OUT + RANKING, last.get(RANKING))
    if ranking is None or not math.isfinite(ranking):
        return ""
    if ranking < CHANCE:
        words = "does not tell hard patches from easy ones"
    elif ranking < CLEAR:
        words = "begins to tell hard patches from easy ones"
    else:
        words = "tells hard patches from easy ones"
    shown = f"ranking accuracy {number(ranking)}; {references(options)[RANKING].name}"
    mining = last.get(HELD_OUT + MINING)
    mines = options.get("mask") in HARD_SHARES and options.get("mask") != "attention"
    if mining is None or not mines or options.get("mine_by", "teacher") != "teacher":
        return f"{words} ({shown})"
    shown = f"ranking accuracy {number(ranking)}, teacher {number(mining)}; 0.5 is chance"
    if mining < 1 - CHANCE:
        return f"{words}, but mining hides easy ones ({shown})"
    if mining < CHANCE <= ranking:
        return f"{words}, but the teacher, which mines, does not ({shown})"
    return f"{words} ({shown})"


def _features(evaluations: Sequence[Saved], last: dict[str, Any], finished: bool) -> str:
    """The best trained features beside the best of random weights and the best raw pixels, of one
    evaluation at the latest step. One is above another if their intervals do not overlap."""
    at_step: dict[int, list[Row]] = {}  # a run that was prolonged may have been evaluated before
    for saved in evaluations:
        if saved.weights != "teacher":
            step = last["step"] if saved.step is None else saved.step
            at_step.setdefault(step, []).extend(r for r in saved.rows or () if "top1" in r.main)
    step = max((step for step, rows in at_step.items() if rows), default=last["step"])
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in at_step.get(step, ()):
        groups.setdefault((row.title, row.options), []).append(row)
    found = [own for own in groups.values() if _best(own, TRAINED) is not None]
    if not found:
        if "probe/linear" in last:
            return f"linear probe {last['probe/linear']:.1f}\u00a0%"
        return "its features are not evaluated yet" if finished else ""
    own = min(found, key=_preference)
    trained = _best(own, TRAINED)
    assert trained is not None
    words = f"{trained.title} {_percent(trained)}"
    words += f" at step {step:,}" if step < last["step"] else ""
    sides: dict[str, list[str]] = {}
    for kind in (RANDOM, RAW_PIXELS):
        other = _best(own, kind)
        if other is not None:
            sides.setdefault(_side(trained, other), []).append(f"{kind} ({_percent(other)})")
    compared = [f"{side} {' and '.join(names)}" for side, names in sides.items()]
    return ", ".join([words, *compared])


def _preference(own: list[Row]) -> tuple[int, bool, int]:
    """By the evaluation; then one with random weights to compare with; then the fewest options."""
    name = own[0].evaluation
    places = [place for place, start in enumerate(PREFERRED) if name.startswith(start)]
    place = min(places, default=len(PREFERRED))
    return place, _best(own, RANDOM) is None, len(own[0].options)


def _best(rows: list[Row], kind: str) -> Row | None:
    own = [row for row in rows if row.features.startswith(kind)]
    return max(own, key=lambda row: row.main["top1"][0], default=None)


def _side(ours: Row, other: Row) -> str:
    (value, low, high), (theirs, their_low, their_high) = ours.main["top1"], other.main["top1"]
    if (value if low is None else low) > (theirs if their_high is None else their_high):
        return "above"
    if (value if high is None else high) < (theirs if their_low is None else their_low):
        return "below"
    return "no different from"


def _percent(row: Row) -> str:
    return f"{row.main['top1'][0]:.1f}\u00a0%"


def _loss(metrics: list[dict[str, Any]]) -> float:
    """The mean of the latest readings of the training loss."""
    values = [line[LOSS] for line in metrics if LOSS in line][-READINGS:]
    return sum(values) / len(values)

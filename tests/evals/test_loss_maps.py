import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hpm
from hpm.data.sources import open_source
from hpm.evals.loss_maps import LossMaps, hardness, loss_maps, object_views, spearman
from hpm.mining.draw import Draw
from hpm.weights.resolve import load


def naive_spearman(x, y):
    def ranks(values):
        return [
            sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2
            for value in values
        ]

    return np.corrcoef(ranks(x), ranks(y))[0, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=12))
def test_spearman_equals_a_naive_version(pairs):
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    ours = spearman(torch.tensor(x).float(), torch.tensor(y).float()).item()
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(naive_spearman(x, y), abs=1e-6)


def test_measures_of_perfect_and_of_reversed_predictions():
    actual = torch.rand(3, 16)
    objects = torch.zeros(3, 8, 8)
    objects[:, :4, :4] = 1  # 4 of the 16 patches of 2 x 2
    on_objects = torch.zeros(4, 4)
    on_objects[:2, :2] = 1
    maps = LossMaps(actual, 2 * actual, on_objects.flatten().repeat(3, 1))
    measured = dict(hardness(maps, objects, (2, 2)))
    assert measured["ranking_accuracy"] == 1
    assert measured["rank_correlation"] == pytest.approx(1)
    assert measured["hard_on_objects"] == 1 and measured["chance_on_objects"] == 0.25
    reverse = dict(hardness(LossMaps(actual, -actual, -actual), None, (2, 2)))
    assert reverse["mining_accuracy"] == 0
    assert reverse["mining_correlation"] == pytest.approx(-1)
    assert "hard_on_objects" not in reverse
    assert dict(hardness(LossMaps(actual, None, None), None, (2, 2))) == {}


def test_patches_that_no_mask_hid_do_not_count():
    actual = torch.tensor([[1.0, 2.0, math.nan, 3.0]])
    predicted = torch.tensor([[1.0, 2.0, -100.0, 3.0]])
    assert (
        dict(hardness(LossMaps(actual, predicted, predicted), None, (2, 2)))["ranking_accuracy"]
        == 1
    )


def test_loss_maps_are_means_over_masks(finished_run):
    trained = load(finished_run.folder)
    images, ids = torch.randn(2, 3, 16, 16), torch.tensor([4, 9])
    target = trained.find_target(torch.device("cpu"))

    def maps(seed, **options):
        draw = Draw(seed, 0, ids)
        return loss_maps(trained.model, trained.find_miner(), images, draw, target, 0.75, **options)

    ten = maps(seed=1, num_masks=10)
    assert torch.equal(ten.actual, maps(seed=1, num_masks=10).actual)
    assert ten.actual.shape == ten.predicted.shape == ten.predicted_hidden.shape == (2, 16)
    assert not torch.equal(ten.actual, maps(seed=2, num_masks=10).actual)
    one = maps(seed=0, num_masks=1)
    assert one.actual.isnan().sum(1).tolist() == [4, 4]  # a quarter stays visible


def test_objects_of_demo():
    source = open_source("demo").test
    views = object_views(source, torch.tensor([0, 1]), (32, 32))
    assert views.shape == (2, 32, 32) and 0 < views.mean() < 0.5


def test_on_the_command_line(finished_run, image_folder):
    result = hpm.evaluate("hardness", str(finished_run.folder), str(image_folder))
    assert not result.values and "ranking accuracy" in str(result)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm.mining import losses

numbers = st.floats(-3, 3, width=32)


def naive_relative(predicted, actual):
    """Binary cross-entropy over all ordered pairs, as a loop in float64."""
    total, pairs = 0.0, 0
    for row_predicted, row_actual in zip(predicted.tolist(), actual.tolist(), strict=True):
        for i in range(len(row_actual)):
            for j in range(len(row_actual)):
                if row_actual[i] == row_actual[j]:
                    continue
                p = 1 / (1 + math.exp(-(row_predicted[i] - row_predicted[j])))
                total -= math.log(p if row_actual[i] > row_actual[j] else 1 - p)
                pairs += 1
    return total, pairs


def matrix(rows, columns):
    return st.lists(
        st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows
    )


@settings(max_examples=50, deadline=None)
@given(predicted=matrix(2, 6), actual=matrix(2, 6))
def test_relative_loss_equals_a_naive_loop(predicted, actual):
    predicted, actual = torch.tensor(predicted), torch.tensor(actual)
    total, pairs = losses.relative_loss(predicted, actual)
    expected, expected_pairs = naive_relative(predicted, actual)
    assert pairs == expected_pairs
    assert total.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(predicted=matrix(2, 5), actual=matrix(2, 5), shift=numbers)
def test_relative_loss_knows_only_the_order_of_losses_and_differences(predicted, actual, shift):
    predicted, actual = torch.tensor(predicted), torch.tensor(actual)
    total, pairs = losses.relative_loss(predicted, actual)
    shifted, _ = losses.relative_loss(predicted + shift, actual)
    torch.testing.assert_close(shifted, total, rtol=1e-4, atol=1e-4)
    ranks = actual.argsort(1).argsort(1).float() if pairs == actual.numel() * 4 else actual
    monotone, _ = losses.relative_loss(predicted, ranks)
    torch.testing.assert_close(monotone, total, rtol=1e-4, atol=1e-4)


def test_relative_loss_does_not_saturate():
    predicted = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    total, pairs = losses.relative_loss(predicted, torch.tensor([[1.0, 0.0]]))
    (total / pairs).backward()
    assert (total / pairs).item() == pytest.approx(400)
    assert predicted.grad.abs().min() > 0.4


def test_relative_loss_of_half_precision_is_computed_in_float32():
    predicted, actual = torch.randn(2, 50), torch.rand(2, 50)
    total, _ = losses.relative_loss(predicted.bfloat16(), actual)
    assert total.dtype == torch.float32


def test_no_pair_differs():
    total, pairs = losses.relative_loss(torch.randn(2, 4), torch.ones(2, 4))
    assert total == 0 and pairs == 0


def test_the_predictors_losses_do_not_reach_the_patch_loss():
    for loss in (lambda p, a: losses.relative_loss(p, a)[0], losses.absolute_loss):
        predicted = torch.randn(2, 4, requires_grad=True)
        actual = torch.rand(2, 4, requires_grad=True)
        loss(predicted, actual).backward()
        assert predicted.grad is not None and actual.grad is None


@settings(max_examples=30, deadline=None)
@given(predicted=matrix(2, 5), actual=matrix(2, 5))
def test_absolute_loss_equals_a_naive_loop(predicted, actual):
    predicted, actual = torch.tensor(predicted).double(), torch.tensor(actual).double()
    total = 0.0
    for p, a in zip(predicted.tolist(), actual.tolist(), strict=True):
        mean = sum(a) / len(a)
        std = math.sqrt(sum((x - mean) ** 2 for x in a) / (len(a) - 1) + 1e-6)
        total += sum((x - (y - mean) / std) ** 2 for x, y in zip(p, a, strict=True))
    ours = losses.absolute_loss(predicted.float(), actual.float()).item()
    assert ours == pytest.approx(total / predicted.numel(), rel=1e-3, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(predicted=matrix(2, 6), actual=matrix(2, 6))
def test_ranking_accuracy_equals_a_naive_count(predicted, actual):
    right, pairs = 0.0, 0
    for p, a in zip(predicted, actual, strict=True):
        for i in range(6):
            for j in range(6):
                if a[i] > a[j]:
                    pairs += 1
                    right += 1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0
    ours = losses.ranking_accuracy(torch.tensor(predicted), torch.tensor(actual)).item()
    assert math.isnan(ours) if pairs == 0 else ours == pytest.approx(right / pairs)


def test_normalized_squared_error_is_two_minus_two_cosines():
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = 2 - 2 * torch.cosine_similarity(a, b, dim=-1)
    torch.testing.assert_close(losses.normalized_squared_error(a, b), expected)

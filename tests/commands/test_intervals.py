import statistics

import pytest

from hpm.commands.intervals import T_800, T_975, interval


def test_quantiles():
    t = pytest.importorskip("scipy.stats").t
    for free, (wide, narrow) in enumerate(zip(T_975, T_800, strict=True), 1):
        assert wide == pytest.approx(t.ppf(0.975, free), abs=6e-4)
        assert narrow == pytest.approx(t.ppf(0.8, free), abs=6e-4)


def test_an_interval():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / 3**0.5)
    assert found.visible == pytest.approx((4.303 + 1.061) / 3**0.5)
    assert found.sign == 0  # 2.0 ± 2.5
    assert interval([2.0, 2.1, 2.2]).sign == 1 and interval([-2.0, -2.1]).sign == -1
    assert interval([]) is None
    one = interval([5.0])
    assert (one.mean, one.half, one.visible, one.sign) == (5.0, None, None, 0)


@pytest.mark.parametrize("differences", [[5.0, 5.0], [0.0, 0.0], [70.3 - 65.3, 30.1 - 25.1, 5.0]])
def test_equal_differences_prove_nothing(differences):
    """They are common where few test images make accuracies coarse."""
    found = interval(differences)
    assert found.mean == pytest.approx(differences[0])
    assert (found.half, found.visible, found.sign) == (0, 0, 0)


def test_many_pairs_take_the_last_quantile():
    differences = [float(number % 5) for number in range(50)]
    error = statistics.stdev(differences) / 50**0.5
    assert interval(differences).half == pytest.approx(T_975[-1] * error)

import math
import re

import pytest

from hpm.show.curves import Chart, Curve, Reference, draw_chart, make_curve, number


def test_thinning_keeps_the_ends_and_every_spike():
    points = [(10 * step, 1 + 0.01 * math.sin(step)) for step in range(50_000)]
    points[777], points[40_123] = (7770, 9.0), (401_230, -5.0)
    curve = make_curve("loss", points)
    assert len(curve.steps) <= 400
    assert curve.steps == sorted(set(curve.steps))
    kept = list(zip(curve.steps, curve.values))
    assert {points[0], points[-1], points[777], points[40_123]} <= set(kept) <= set(points)


def test_short_curves_are_kept_whole_and_in_order():
    assert make_curve("a", [(4, 2.0), (2, 1.0)]) == Curve("a", [2, 4], [1.0, 2.0])
    assert make_curve("a", [(2, math.nan), (4, math.inf), (6, 1.0)]).steps == [6]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0, 5e-9], [1e12, 2e12]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_every_range_can_be_drawn(values, from_zero):
    curve = make_curve("x", list(enumerate(values)))
    html, numbers = draw_chart(Chart("a <title>", "what it is", {}, from_zero), [curve], 1)
    assert "a &lt;title&gt;" in html and "nan" not in html
    assert numbers["low"] <= min(values) and max(values) <= numbers["high"]
    path = re.search(r'class="curve c0" d="M([^"]*)"', html)[1]
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert len(heights) == len(values) and all(0 <= y <= 1000 for y in heights)


def test_a_reference_lies_on_the_axis():
    chart = Chart("loss", "", {}, reference=Reference(1.0, "1.0 is <the mean>"))
    html, numbers = draw_chart(chart, [make_curve("a", [(0, 0.3), (1, 0.2)])], 1)
    (height,) = re.findall(r'class="reference" d="M0 ([\d.]+)H1000"', html)
    place = 1000 * (numbers["high"] - 1) / (numbers["high"] - numbers["low"])
    assert float(height) == pytest.approx(place, abs=0.1) and 0 < place < 500
    assert "1.0 is &lt;the mean&gt;" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (12.3456, "12.3"),
        (123.6, "124"),
        (12_345.6, "12,346"),
        (1.234e-5, "1.23e-5"),
        (0.99954, "0.99954"),
        (0.9987, "0.9987"),
        (1.0, "1.00"),
        (150.0, "150"),
        (999.7, "1,000"),
        (1e-7, "1.00e-7"),
        (0.0, "0"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_have_three_digits_and_more_only_just_below_one(value, text):
    assert number(value) == text

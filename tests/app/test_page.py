"""The pieces of a page."""

import math

import pytest

from graft.app import page


def test_curve_keeps_ends_and_leaves_out_what_is_not_finite() -> None:
    points = [(float(step), 1.0 / step) for step in range(1, 2001)] + [(2001.0, math.nan)]
    drawing = page.curve({"loss": points})
    assert drawing.count("<path") == 2
    assert "nan" not in drawing
    assert len(page.thin(points[:-1])) <= 300


@pytest.mark.parametrize("series", [{}, {"loss": []}, {"loss": [(1.0, math.inf)]}])
def test_curve_without_values(series: dict) -> None:
    assert "No values yet" in page.curve(series)


def test_curve_of_one_point_and_of_a_constant() -> None:
    assert "<svg" in page.curve({"loss": [(1.0, 0.5)]})
    assert "<svg" in page.curve({"loss": [(1.0, 0.5), (2.0, 0.5)]})


def test_thin_and_smooth_keep_the_mean() -> None:
    points = [(float(x), float(x)) for x in range(1000)]
    thinned = page.thin(points, most=100)
    assert len(thinned) == 100
    assert sum(y for _, y in thinned) / 100 == pytest.approx(499.5)
    assert page.smooth([(0.0, 3.0)] * 10) == [(0.0, 3.0)] * 10


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.021), (1, 300), (-5, 5), (1e-8, 3e-8)])
def test_ticks_are_inside_and_even(low: float, high: float) -> None:
    values = page.ticks(low, high)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in values)


def test_table_aligns_numbers_and_escapes_text() -> None:
    drawn = page.table([{"name": "<b>", "score": 0.123456}, {"name": "x", "score": None, "extra": 1}])
    assert "&lt;b&gt;" in drawn
    assert "<td class=number>0.1235</td>" in drawn
    assert drawn.count("<th") == 4  # three columns, and <thead>
    assert "<td>x</td><td class=number></td>" in drawn

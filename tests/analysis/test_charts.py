"""Charts as values: ticks, thinning, gaps, numbers, sparklines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.analysis.charts import axis, fit_ticks, series_of, thin
from distckpt.analysis.live import BLOCKS, sparkline
from distckpt.analysis.texts import duration, number

FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(st.lists(FINITE, min_size=1, max_size=30), st.booleans())
def test_an_axis_holds_all_values_and_its_ticks_differ(values: list[float], whole: bool) -> None:
    found = axis(values, whole=whole)
    assert found.low <= min(values) <= max(values) <= found.high
    assert all(-1e-9 <= found.at(value) <= 1 + 1e-9 for value, _ in found.ticks)
    labels = [label for _, label in found.ticks]
    assert len(labels) <= 8
    if max(values) - min(values) > 1e-6 * max(map(abs, values)):
        assert len(set(labels)) == len(labels)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30))
def test_labels_below_an_axis_do_not_touch(values: list[int]) -> None:
    found = fit_ticks(axis(map(float, values), whole=True), 340)
    places = [(found.at(value) * 340, len(label) * 6.4 / 2) for value, label in found.ticks]
    assert all(b[0] - a[0] > a[1] + b[1] for a, b in pairwise(places))


def test_orders_of_magnitude_get_a_logarithmic_axis() -> None:
    found = axis([1e-5, 10.0])
    assert found.log
    assert [label for _, label in found.ticks][:2] == ["1e-5", "0.0001"] or found.ticks[0][0] == 1e-5
    assert found.at(1e-5) == 0
    assert not axis([0.0, 10.0]).log
    assert not axis([1.0, 900.0]).log


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(step), math.sin(step / 500)) for step in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[77] = (77.0, -50.0)
    kept = thin(points)
    assert len(kept) <= 400
    assert {points[0], points[-1], points[77], points[4321]} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin(points[:400]) == points[:400]


def test_a_line_is_not_drawn_across_what_is_not_finite() -> None:
    values = [1.0, 2.0, math.nan, 4.0, math.inf, math.nan, 7.0, 8.0]
    line = series_of("loss", [(float(i), value) for i, value in enumerate(values)])
    assert line.lost == (2.0, 4.0, 5.0)
    assert line.stretches == [[(0.0, 1.0), (1.0, 2.0)], [(3.0, 4.0)], [(6.0, 7.0), (7.0, 8.0)]]
    assert (line.height_at(0.5), line.height_at(2.0), line.height_at(6.5)) == (1.5, None, 7.5)
    assert series_of("loss", [(1.0, math.nan)]).stretches == []


@pytest.mark.parametrize(
    ("value", "step", "shown"),
    [(0, 1, "0"), (1234567.0, 0, "1.235M"), (0.00001, 0.00001, "1e-5"), (250.0, 50.0, "250"), (12000.0, 2000.0, "12k"),
     (0.25, 0.05, "0.25"), (math.nan, 0, "nan"), (-0.3283, 0, "-0.3283"), (3e20, 0, "3.000e20")],
)  # fmt: skip
def test_numbers(value: float, step: float, shown: str) -> None:
    assert number(value, step) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, ""), (0.351, "0.35 s"), (59.9, "60 s"), (61, "1 min 1 s"), (7200, "2 h"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8) == BLOCKS
    assert sparkline([1.0, math.nan, 2.0], 10) == f"{BLOCKS[0]}x{BLOCKS[7]}"
    assert sparkline([5.0, 5.0], 10) == BLOCKS[4] * 2
    assert sparkline([float(i) for i in range(1000)], 20) == "".join(
        sorted(sparkline([float(i) for i in range(1000)], 20))
    )
    assert sparkline([1e308, -1e308, math.inf], 3) != ""
    assert sparkline([], 5) == ""

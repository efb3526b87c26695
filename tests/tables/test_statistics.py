from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hagd.tables.statistics import Measured, exponent, interval_of, measure

T_975 = {1: 12.7062, 2: 4.3027, 4: 2.7764}
"""Student's quantiles from a printed table, by degrees of freedom."""


@pytest.mark.parametrize("values", [[0.9, 0.95], [0.5, 0.7, 0.9], [1.0, 2.0, 3.0, 4.0, 10.0]])
def test_mean_spread_and_interval_are_numpys(values: list[float]) -> None:
    found = measure([{"m": value} for value in values], "m", {})
    assert found is not None and found.n == len(values) and found.interval is not None and found.sd is not None
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    half = T_975[len(values) - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.interval == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=1e-3)


def test_one_seed_has_the_interval_over_its_prompts_or_none() -> None:
    run = {"m": 0.5, "m.low": 0.4, "m.high": 0.7, "bare": 1.0}
    assert measure([run], "m", {}) == Measured(0.5, None, 1, (0.4, 0.7))
    assert measure([run], "bare", {}) == Measured(1.0, None, 1, None)


def test_runs_without_the_figure_do_not_count() -> None:
    assert measure([{"m": 1.0}, {}, {"m": 3.0}], "m", {}) == measure([{"m": 1.0}, {"m": 3.0}], "m", {})
    assert measure([{}], "m", {}) is None and interval_of([{}], "m") is None


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_mark_is_missing_only_above_the_control(low: float, width: float, control: float, above: float) -> None:
    run = {"m": low, "m.low": low, "m.high": low + width, "c": control, "c.low": control, "c.high": control + above}
    found = measure([run], "m", {"x": "c"})
    assert found is not None
    assert (found.marks == ()) == (low > control + above)


def test_marks_over_seeds() -> None:
    runs = [
        {"m": 0.9, "near": 0.6, "far": 0.1},
        {"m": 0.92, "near": 0.8, "far": 0.12},
        {"m": 0.91, "near": 1.0, "far": 0.1},
    ]
    found = measure(runs, "m", {"n": "near", "f": "far", "u": "unmeasured"})
    assert found is not None and found.marks == ("n", "u")
    lone = measure([{"m": 1.0, "c": 0.0}], "m", {"c": "c"})
    assert lone is not None and lone.marks == ("c",), "without intervals nothing is shown"


def test_the_exponent_is_numpys_line_through_logarithms() -> None:
    rng = np.random.default_rng(0)
    x = np.array([1.0, 2.0, 5.0, 10.0, 20.0, 50.0])
    y = 3 * x**1.7 * np.exp(0.1 * rng.normal(size=6))
    found = exponent([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], "x", "y")
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert found is not None and found.n == 6 and found.interval is not None
    assert found.value == pytest.approx(slope)
    half = T_975[4] * math.sqrt(covariance[0, 0])
    assert found.interval == pytest.approx((slope - half, slope + half), abs=1e-4)


def test_what_has_no_exponent() -> None:
    two = [{"x": 1.0, "y": 2.0}, {"x": 10.0, "y": 200.0}]
    found = exponent(two, "x", "y")
    assert found is not None and found.value == pytest.approx(2) and found.interval is None
    assert exponent([two[0], {"x": 1.0, "y": 3.0}], "x", "y") is None, "one x"
    assert exponent([two[0], {"x": 5.0}, {"y": 1.0}, {"x": 0.0, "y": 1.0}], "x", "y") is None

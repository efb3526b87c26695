"""Intervals of differences between methods on the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from scipy.stats import t as student


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % t-interval; of one value NaN."""
    if len(values) < 2:
        return values[0], float("nan")
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5

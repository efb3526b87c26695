"""Mean, spread and interval over seeds, and the comparison with controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Measured:
    """One figure over the seeds of a cell.

    Attributes:
        mean: over seeds.
        sd: sample standard deviation; None with one seed.
        n: seeds.
        interval: 95 %; None when there is none.
        marks: controls above which the interval is not shown to lie.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None
    marks: tuple[str, ...] = ()


def measure(runs: Sequence[Mapping[str, float]], metric: str, controls: Mapping[str, str]) -> Measured | None:
    """`metric` over `runs`, one a seed; None when no run has it.

    The 95 % interval is Student's over seeds; that of a single run is the bootstrap interval over its prompts
    (`METRIC.low`, `METRIC.high`), where it recorded one.

    Args:
        runs: flat metrics.
        metric: which figure.
        controls: mark → metric of the same runs. The mark is set unless the interval of `metric` lies above the
            interval of the control; also where one of the two has no interval.
    """
    values = [run[metric] for run in runs if metric in run]
    if not values:
        return None
    interval = interval_of(runs, metric)
    marks = tuple(mark for mark, control in controls.items() if not _above(interval, interval_of(runs, control)))
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Measured(float(np.mean(values)), sd, len(values), interval, marks)


def interval_of(runs: Sequence[Mapping[str, float]], metric: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric over `runs`; see `measure`."""
    having = [run for run in runs if metric in run]
    if len(having) == 1:
        low, high = having[0].get(f"{metric}.low"), having[0].get(f"{metric}.high")
        return None if low is None or high is None else (low, high)
    if not having:
        return None
    values = np.array([run[metric] for run in having])
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


@dataclass(frozen=True)
class Exponent:
    """y ∝ x to the power `value`.

    Attributes:
        value: slope of the least-squares line through logarithms.
        interval: 95 %, Student's; None with two runs, through which every line is exact.
        n: runs.
    """

    value: float
    interval: tuple[float, float] | None
    n: int


def exponent(runs: Sequence[Mapping[str, float]], x: str, y: str) -> Exponent | None:
    """How `y` grows with `x` over `runs`; None with fewer than two different positive x."""
    points = np.array([(run[x], run[y]) for run in runs if run.get(x, 0) > 0 and run.get(y, 0) > 0])
    if len(points) < 2 or len(set(points[:, 0])) < 2:
        return None
    line = stats.linregress(*np.log(points).T)
    if len(points) == 2:
        return Exponent(float(line.slope), None, 2)
    half = float(stats.t.ppf(0.975, len(points) - 2)) * float(line.stderr)
    return Exponent(float(line.slope), (float(line.slope) - half, float(line.slope) + half), len(points))


def _above(interval: tuple[float, float] | None, control: tuple[float, float] | None) -> bool:
    return interval is not None and control is not None and interval[0] > control[1]

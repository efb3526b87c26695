"""Preservation, faithfulness and areas under it on per-prompt outcomes, and bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hagd.patching.objective import Outcome

Statistic = Callable[[np.ndarray], float]


class Interval(NamedTuple):
    """A statistic and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def named(self, key: str) -> dict[str, float]:
        """As metrics `key`, `key.low` and `key.high`."""
        return {key: self.value, f"{key}.low": self.low, f"{key}.high": self.high}


def preservation(circuit: Outcome, full: Outcome) -> Callable[[np.ndarray], float]:
    """φ = accuracy(M_C) / accuracy(M) as a statistic of prompt indices."""
    mine, theirs = circuit.correct.numpy().astype(float), full.correct.numpy().astype(float)
    return lambda index: _ratio(mine[index].mean(), theirs[index].mean())


def faithfulness(circuit: Outcome, full: Outcome, empty: Outcome) -> Callable[[np.ndarray], float]:
    """F = (μ(M_C) − μ(M_∅)) / (μ(M) − μ(M_∅)), μ the mean logit difference, as a statistic of prompt indices."""
    c, m, e = (x.logit_difference.double().numpy() for x in (circuit, full, empty))
    return lambda index: _ratio(c[index].mean() - e[index].mean(), m[index].mean() - e[index].mean())


def bootstrap(statistic: Statistic, n: int, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap over `n` prompts, or nodes; the value itself is of all of them.

    Resamples in which the statistic is undefined are left out; where it is in all of them, so are the bounds (NaN).
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)])
    defined = values[np.isfinite(values)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    return Interval(statistic(np.arange(n)), float(low), float(high))


def of_draws(values: Sequence[float]) -> Interval:
    """The mean over draws, and the range of 95 % of them."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))


def area_log(sizes: Sequence[int], values: Sequence[float]) -> float:
    """`cpr_log`: trapezoid of F over the logarithm of size, scaled so that F ≡ 1 gives 1."""
    x = np.log(np.asarray(sizes, dtype=float))
    return float(np.trapezoid(values, x) / (x[-1] - x[0])) if len(sizes) > 1 else float(values[0])


def area_linear(sizes: Sequence[int], values: Sequence[float], n: int) -> float:
    """MIB's CPR: trapezoid of F over the kept fraction, from the empty circuit (F = 0) to all `n` nodes."""
    x = np.concatenate([[0.0], np.asarray(sizes, dtype=float) / n])
    return float(np.trapezoid(np.concatenate([[0.0], values]), x))


def distance_linear(sizes: Sequence[int], values: Sequence[float], n: int) -> float:
    """MIB's CMD: trapezoid of |1 − F| over the kept fraction; 0 is perfect."""
    x = np.concatenate([[0.0], np.asarray(sizes, dtype=float) / n])
    return float(np.trapezoid(np.abs(1.0 - np.concatenate([[0.0], values])), x))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")

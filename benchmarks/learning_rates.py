"""Which learning rate to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping

FACTOR = 3.0
ENOUGH = 4
MOST = 6


def next_rate(default: float, tried: Mapping[float, float]) -> float | None:
    """The next rate to train with, given the unexplained variance of those tried; None when the search is over.

    The default and three times as much come first, then steps of a factor of three in the direction of the better one,
    until the best rate lies between two worse ones or six are tried. While fewer than four were tried, the next one is
    between the best and its better neighbour. A training that diverged counts as infinitely bad.
    """
    for rate in (default, default * FACTOR):
        if not any(math.isclose(rate, other) for other in tried):
            return rate
    if len(tried) >= MOST:
        return None
    missed = {rate: value if math.isfinite(value) else math.inf for rate, value in tried.items()}
    ordered = sorted(missed)
    best = best_rate(tried)
    if best == ordered[0]:
        return best / FACTOR
    if best == ordered[-1]:
        return best * FACTOR
    if len(tried) >= ENOUGH:
        return None
    place = ordered.index(best)
    neighbour = min(ordered[place - 1], ordered[place + 1], key=missed.__getitem__)
    return math.sqrt(best * neighbour)


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the least unexplained variance, not counting trainings that diverged."""
    return min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)

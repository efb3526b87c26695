"""Exhaustive search: every circuit of a size is measured. Ground truth for other methods, where candidates are few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, islice
from math import comb

import numpy as np
import torch

from hagd.errors import ConfigError
from hagd.patching.objective import Objective
from hagd.search.gates import scatter

MOST = 20
"""Candidates at most: 2²⁰ circuits."""

_AT_ONCE = 256


def best_circuits(
    objective: Objective,
    flat: np.ndarray,
    sizes: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, np.ndarray]:
    """Members (indices of candidates) of the circuit of each size with the smallest loss.

    Args:
        objective: the discovery split; every prompt is read.
        flat: int64 `[n]`, positions of the candidates in the flattened gates.
        sizes: up to n.
        progress: called with circuits measured and to measure.

    Raises:
        ConfigError: more than 20 candidates.
    """
    n = len(flat)
    if n > MOST:
        raise ConfigError(
            f"search.method=exhaustive: expected at most {MOST} candidates, found {n}; set graph.n_max={MOST}"
        )
    device = objective.patched.lm.device
    positions, index = torch.as_tensor(flat, device=device), torch.arange(len(objective))
    total, done = sum(comb(n, size) for size in sizes), 0
    found: dict[int, np.ndarray] = {}
    for size in sizes:
        lowest = float("inf")
        subsets = combinations(range(n), size)
        while part := list(islice(subsets, _AT_ONCE)):
            kept = torch.zeros(len(part), n, device=device).scatter(1, torch.tensor(part, device=device), 1.0)
            gates = torch.stack([scatter(row, positions, objective.patched.gate_shape) for row in kept])
            losses = objective.losses(gates, index)
            if float(losses.min()) < lowest:
                lowest, found[size] = float(losses.min()), np.array(part[int(losses.argmin())])
            done += len(part)
            if progress is not None:
                progress(done, total)
    return found

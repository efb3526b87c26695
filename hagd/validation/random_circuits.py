"""Random circuits, the control of every figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hagd.attribution.records import AttributionGraph
from hagd.search.records import Circuit


def random_matched(
    graph: AttributionGraph, circuit: Circuit, n: int, seed: int | Sequence[int], classes: np.ndarray | None = None
) -> list[Circuit]:
    """`n` random circuits with as many nodes of each kind in each (layer, slot) as `circuit`, among the candidates.

    With `classes` `[n_candidates]`, not negative, also as many of each class there.
    """
    rng = np.random.default_rng(seed)
    cell = cells(graph)
    if classes is not None:
        cell = cell * (classes.max() + 1) + classes
    inside = np.isin(graph.flat, circuit.nodes)
    pools = [(np.flatnonzero(cell == c), int(inside[cell == c].sum())) for c in np.unique(cell)]
    return [
        Circuit(np.sort(graph.flat[np.concatenate([rng.choice(pool, size, replace=False) for pool, size in pools])]))
        for _ in range(n)
    ]


def cells(graph: AttributionGraph) -> np.ndarray:
    """Kind, layer and slot of every candidate as one number, int64 `[n_candidates]`."""
    nodes = graph.nodes
    row = nodes.kind * (nodes.layer.max() + 1) + nodes.layer
    return (row * (nodes.slot.max() + 1) + nodes.slot)[: graph.n_candidates]


def random_circuits(graph: AttributionGraph, size: int, n: int, seed: int | Sequence[int]) -> list[Circuit]:
    """`n` random circuits of `size` candidates anywhere."""
    rng = np.random.default_rng(seed)
    return [Circuit(np.sort(rng.choice(graph.flat, size, replace=False))) for _ in range(n)]

"""Minimality: whether a circuit needs each of its nodes (Wang et al., arXiv 2211.00593).

As a test against nodes outside: Shi et al., arXiv 2410.13032.
"""

from __future__ import annotations

import numpy as np

from hagd.attribution.records import AttributionGraph
from hagd.search.records import Circuit
from hagd.validation.bench import Bench, Count, logit_differences
from hagd.validation.random_circuits import cells

_LEVEL = 0.95


def minimality_metrics(
    bench: Bench, graph: AttributionGraph, circuit: Circuit, n: int, seed: int, count: Count
) -> dict[str, float]:
    """What single nodes do to the circuit's faithfulness F.

    - `validation.node_effect`: mean of |F(C) − F(C∖{v})| over up to `n` nodes v of the circuit, drawn at random.
    - `control.outsiders.node_effect`: mean of |F(C∪{u}) − F(C)| over as many candidates u outside, one for each v, of
      its kind, layer and slot while there are any.
    - `validation.minimality`: share of the v whose effect is above the 95th percentile of those of the u. Nodes that
      are worth no more than those outside give 0.05.

    Intervals are over prompts. No figures where there is no node on one of the sides.
    """
    members, outsiders = draw_pairs(graph, circuit, n, seed)
    if not len(members) or not len(outsiders):
        return {}

    def measured(nodes: np.ndarray) -> np.ndarray:
        count()
        return logit_differences([bench.run(Circuit(nodes).gates(bench.gate_shape))])[0]

    own = logit_differences([bench.run(circuit.gates(bench.gate_shape))])[0]
    removed = np.stack([measured(np.setdiff1d(circuit.nodes, node)) for node in members]) - own
    added = np.stack([measured(np.union1d(circuit.nodes, node)) for node in outsiders]) - own

    def minimality(index: np.ndarray) -> float:
        inside, outside = (np.abs(bench.share_of_behaviour(each, index)) for each in (removed, added))
        return float((inside > np.quantile(outside, _LEVEL)).mean()) if np.isfinite(outside).all() else float("nan")

    def effect(differences: np.ndarray, index: np.ndarray) -> float:
        return float(np.abs(bench.share_of_behaviour(differences, index)).mean())

    return {
        **bench.interval(minimality).named("validation.minimality"),
        **bench.interval(lambda index: effect(removed, index)).named("validation.node_effect"),
        **bench.interval(lambda index: effect(added, index)).named("control.outsiders.node_effect"),
    }


def draw_pairs(graph: AttributionGraph, circuit: Circuit, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `n` nodes of the circuit that are candidates, and as many candidates outside it while there are any.

    Each is a position in the flattened gates; an outsider is of the kind, layer and slot of the member at its place
    while there are such.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(graph.n_candidates)
    cell, inside = cells(graph), np.isin(graph.flat, circuit.nodes)
    members, free = order[inside[order]][:n], list(order[~inside[order]])
    outsiders = []
    for member in members[: len(free)]:
        alike = (i for i, outsider in enumerate(free) if cell[outsider] == cell[member])
        outsiders.append(free.pop(next(alike, 0)))
    return graph.flat[members], graph.flat[np.array(outsiders, dtype=int)]

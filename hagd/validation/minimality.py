"""Minimality: whether a circuit needs each of its nodes (Wang et al., arXiv 2211.00593).

As a test against nodes outside: Shi et al., arXiv 2410.13032.
"""

from __future__ import annotations

import numpy as np

from hagd.attribution.records import AttributionGraph
from hagd.search.records import Circuit
from hagd.validation.bench import Bench, Count
from hagd.validation.measures import Interval, Statistic, bootstrap, faithfulness
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
      are worth no more than those outside give 0.06 where 64 are drawn, and more where fewer are (8: 0.15).

    Intervals are over nodes. No figures where there is no node on one of the sides.
    """
    members, outsiders = draw_pairs(graph, circuit, n, seed)
    if not len(members) or not len(outsiders):
        return {}

    def measured(nodes: np.ndarray) -> float:
        outcome = bench.run_circuit(Circuit(nodes))
        return faithfulness(outcome, bench.full, bench.empty)(np.arange(len(bench.objective)))

    def moved(nodes: np.ndarray) -> float:
        count()
        return abs(measured(nodes) - own)

    own = measured(circuit.nodes)
    inside = np.array([moved(np.setdiff1d(circuit.nodes, node)) for node in members])
    outside = np.array([moved(np.union1d(circuit.nodes, node)) for node in outsiders])

    def over_nodes(statistic: Statistic, n_nodes: int) -> Interval:
        return bootstrap(statistic, n_nodes, bench.n_bootstrap, bench.seed)

    return {
        **over_nodes(share_beyond(inside, outside), len(inside)).named("validation.minimality"),
        **over_nodes(lambda index: float(inside[index].mean()), len(inside)).named("validation.node_effect"),
        **over_nodes(lambda index: float(outside[index].mean()), len(outside)).named("control.outsiders.node_effect"),
    }


def share_beyond(inside: np.ndarray, outside: np.ndarray) -> Statistic:
    """Share of effects of members above the 95th percentile of those outside, as a statistic of members.

    A member is drawn with the outsider at its place; NaN where none that is drawn has one, or effects are undefined.
    """

    def share(index: np.ndarray) -> float:
        beside = outside[index[index < len(outside)]]
        defined = len(beside) and np.isfinite(inside).all()
        return float((inside[index] > np.quantile(beside, _LEVEL)).mean()) if defined else float("nan")

    return share


def draw_pairs(graph: AttributionGraph, circuit: Circuit, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `n` nodes of the circuit that are candidates, and as many candidates outside it while there are any.

    Each is a position in the flattened gates; an outsider is of the kind, layer and slot of the member at its place
    while there are such. Members without one come last.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(graph.n_candidates)
    cell, inside = cells(graph), np.isin(graph.flat, circuit.nodes)
    members, free = order[inside[order]][:n].tolist(), order[~inside[order]].tolist()
    found: dict[int, int] = {}
    for only_alike in (True, False):  # the rest is given away only when every member has chosen among its like
        for member in (each for each in members if each not in found):
            choice = (i for i, outsider in enumerate(free) if not only_alike or cell[outsider] == cell[member])
            if (i := next(choice, None)) is not None:
                found[member] = free.pop(i)
    members.sort(key=lambda member: member not in found)
    outsiders = [found[member] for member in members if member in found]
    return graph.flat[members], graph.flat[np.array(outsiders, dtype=int)]

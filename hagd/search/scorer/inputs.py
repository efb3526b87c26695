"""What the scorer reads of an attribution graph and its hierarchy.

Inputs are ranks, logarithms of ratios, shares and signs, so that a scorer trained on one model means something on
another; there are no identities of features, layers or supernodes, so renumbering the nodes renumbers the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN, AttributionGraph
from hagd.hierarchy.quality import supernode_edges
from hagd.hierarchy.records import Hierarchy
from hagd.search.records import Circuit
from hagd.search.scorer.records import DOWN, NODE, SUPERNODE, UP, ScoredGraph

INPUTS = (
    "importance_rank",
    "importance_position",
    "attribution",
    "attribution_sign",
    "mean",
    "frequency",
    "layer",
    "slot",
    "answer_slot",
    "in_degree",
    "out_degree",
    "size",
    "level",
    "feature",
    "head",
    "error",
    "token",
    "logit",
    "supernode",
)
IMPORTANCE = INPUTS.index("importance_rank")
_DECADES = 4.0
"""Ratios below 10^-4 count as that."""
_MESSAGES = 8
"""Strongest edges into each node (all of those into the logit) along which messages pass; degrees count every edge."""


class _Quantities(NamedTuple):
    """Raw quantities of nodes or of the supernodes of one level, each `[n]` but `kind` `[n, 6]`."""

    importance: np.ndarray
    attribution: np.ndarray
    mean: np.ndarray
    frequency: np.ndarray
    layer: np.ndarray
    slot: np.ndarray
    answer_slot: np.ndarray
    in_degree: np.ndarray
    out_degree: np.ndarray
    size: np.ndarray
    level: np.ndarray
    kind: np.ndarray


class _Edges(NamedTuple):
    ends: np.ndarray
    kind: np.ndarray
    attr: np.ndarray


def scored_graph(
    graph: AttributionGraph, hierarchy: Hierarchy, target: np.ndarray | None, name: str, n_layers: int
) -> ScoredGraph:
    """The scorer's view of `graph` and `hierarchy`.

    Args:
        graph: its candidates are scored.
        hierarchy: of the same graph.
        target: `[n_candidates]` in [0, 1], as from `membership_target`; None when unknown.
        name: for messages.
        n_layers: layers of the language model, against which a node's layer is measured.

    Raises:
        ArtifactError: the hierarchy was built for other nodes.
    """
    hierarchy.require(graph)
    nodes = _node_quantities(graph, n_layers)
    kept = _strongest(graph.edge_index, graph.edge_attr) | (graph.nodes.kind[graph.edge_index[1]] == LOGIT)
    blocks, parts = [_columns(nodes)], _both_ways(graph.edge_index[:, kept], graph.edge_attr[kept], NODE)
    offset = len(graph.nodes)
    offsets = offset + np.cumsum([0] + [level.n_supernodes for level in hierarchy.levels])
    for i, level in enumerate(hierarchy.levels):
        edges = supernode_edges(graph, level.supernode).tocoo()
        between = (edges.row != edges.col) & (edges.data != 0)
        index, weight = np.stack([edges.row, edges.col])[:, between], edges.data[between]
        blocks.append(_columns(_pool(nodes, level.supernode, index, weight, i / len(hierarchy.levels))))
        kept = _strongest(index, weight)
        parts += _both_ways(index[:, kept] + offsets[i], weight[kept], SUPERNODE)
        if i > 0:
            parts += _containment(
                _parents(level.supernode, hierarchy.levels[i - 1].supernode), offsets[i], offsets[i - 1]
            )
    parts += _containment(hierarchy.levels[-1].supernode, 0, offsets[len(hierarchy.levels) - 1])
    known = np.zeros(graph.n_candidates) if target is None else target
    return ScoredGraph(
        name=name,
        inputs=torch.from_numpy(np.concatenate(blocks).astype(np.float32)),
        edge_index=torch.from_numpy(np.concatenate([part.ends for part in parts], axis=1).astype(np.int64)),
        edge_type=torch.from_numpy(np.concatenate([part.kind for part in parts])),
        edge_attr=torch.from_numpy(np.concatenate([part.attr for part in parts])),
        n_candidates=graph.n_candidates,
        target=torch.from_numpy(known.astype(np.float32)),
    )


def membership_target(circuits: Sequence[Circuit], flat: np.ndarray) -> np.ndarray:
    """Share of `circuits` (one a size) that each candidate belongs to, float32 `[n_candidates]`.

    Args:
        circuits: at least one.
        flat: the candidates' positions in the flattened gates, as in `AttributionGraph.flat`.
    """
    inside = np.stack([np.isin(flat, circuit.nodes) for circuit in circuits])
    return np.asarray(inside.mean(axis=0, dtype=np.float32))


def _node_quantities(graph: AttributionGraph, n_layers: int) -> _Quantities:
    nodes, n = graph.nodes, len(graph.nodes)
    answer = nodes.slot[nodes.kind == LOGIT]
    in_degree, out_degree = _degrees(graph.edge_index, graph.edge_attr, n)
    return _Quantities(
        importance=nodes.importance,
        attribution=nodes.attribution,
        mean=nodes.mean,
        frequency=nodes.frequency,
        layer=(nodes.layer + 1) / (n_layers + 1),
        slot=nodes.slot / max(nodes.slot.max(), 1),
        answer_slot=np.isin(nodes.slot, answer),
        in_degree=in_degree,
        out_degree=out_degree,
        size=np.ones(n),
        level=np.ones(n),
        kind=np.stack(
            [nodes.kind == kind for kind in (FEATURE, HEAD, ERROR, TOKEN, LOGIT)] + [np.zeros(n, bool)], axis=1
        ),
    )


def _pool(
    nodes: _Quantities, supernode: np.ndarray, index: np.ndarray, weight: np.ndarray, level: float
) -> _Quantities:
    """Of supernodes: sums of what adds up, means of the rest, degrees of their own edges."""
    size = np.bincount(supernode)
    n = len(size)
    in_degree, out_degree = _degrees(index, weight, n)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(supernode, weights=values)

    kind = np.zeros((n, nodes.kind.shape[1]))
    kind[:, -1] = 1
    return _Quantities(
        importance=total(nodes.importance),
        attribution=total(nodes.attribution),
        mean=total(nodes.mean) / size,
        frequency=total(nodes.frequency) / size,
        layer=total(nodes.layer) / size,
        slot=total(nodes.slot) / size,
        answer_slot=total(nodes.answer_slot) / size,
        in_degree=in_degree,
        out_degree=out_degree,
        size=size,
        level=np.full(n, level),
        kind=kind,
    )


def _columns(raw: _Quantities) -> np.ndarray:
    """`[n, F]`, columns as in INPUTS."""
    rank = _rank(raw.importance)
    n = len(rank)
    columns = [
        rank,
        -np.log10(1 + 1 / n - rank) / _DECADES,  # tells the first from the tenth, which the rank hardly does
        _relative(raw.attribution, np.abs(raw.attribution).max()),
        np.sign(raw.attribution),
        _relative(raw.mean, np.abs(raw.mean).max()),
        raw.frequency,
        raw.layer,
        raw.slot,
        raw.answer_slot,
        _rank(raw.in_degree),
        _rank(raw.out_degree),
        np.log(raw.size) / np.log(max(raw.size.sum(), 2)),
        raw.level,
    ]
    return np.concatenate([np.stack(columns, axis=1), raw.kind], axis=1)


def _rank(values: np.ndarray) -> np.ndarray:
    """In (0, 1], equal values share their mean rank; float32 hides in which order a sum was taken."""
    return np.asarray(rankdata(values.astype(np.float32))) / len(values)


def _relative(values: np.ndarray, largest: np.ndarray | float) -> np.ndarray:
    """`|values| / largest` on a logarithmic scale from 0 (10^-4 and less) to 1."""
    ratio = np.abs(values) / np.maximum(largest, np.finfo(np.float32).tiny)
    return np.asarray(1 + np.log10(np.clip(ratio, 10**-_DECADES, 1)) / _DECADES)


def _degrees(index: np.ndarray, weight: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of |weight| into and out of each of `n` nodes."""
    source, target = index
    size = np.abs(weight)
    return np.bincount(target, size, minlength=n), np.bincount(source, size, minlength=n)


def _strongest(index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Bool `[E]`: among the `_MESSAGES` largest |weight| into its target."""
    order = np.lexsort((-np.abs(weight), index[1]))
    target = index[1][order]
    kept = np.empty(len(order), dtype=bool)
    kept[order] = np.arange(len(order)) - np.searchsorted(target, target) < _MESSAGES
    return kept


def _both_ways(index: np.ndarray, weight: np.ndarray, kind: int) -> list[_Edges]:
    """Edges along (`kind`) and against (`kind` + 1) their direction."""
    size = np.abs(weight)
    largest = np.zeros(index.max(initial=-1) + 1, dtype=size.dtype)
    np.maximum.at(largest, index[1], size)
    attr = np.stack([_relative(weight, largest[index[1]]), np.sign(weight)], axis=1).astype(np.float32)
    return [
        _Edges(index, np.full(len(weight), kind), attr),
        _Edges(index[::-1], np.full(len(weight), kind + 1), attr),
    ]


def _containment(parent: np.ndarray, child_offset: int, parent_offset: int) -> list[_Edges]:
    n = len(parent)
    index = np.stack([np.arange(n) + child_offset, parent + parent_offset])
    attr = np.tile(np.array([1, 0], dtype=np.float32), (n, 1))
    return [_Edges(index, np.full(n, UP), attr), _Edges(index[::-1], np.full(n, DOWN), attr)]


def _parents(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Coarse supernode of every fine one."""
    parent = np.empty(fine.max() + 1, dtype=np.int64)
    parent[fine] = coarse
    return parent

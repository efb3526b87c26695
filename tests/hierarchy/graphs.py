"""Attribution graphs for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from hagd.attribution.records import FEATURE, Attribution, AttributionGraph, Nodes


def feature_graph(n: int, source: ArrayLike, target: ArrayLike, weight: ArrayLike) -> AttributionGraph:
    """Feature nodes and the given edges between them."""
    zeros = np.zeros(n)
    ids = np.arange(n)
    nodes = Nodes(np.full(n, FEATURE), ids * 0, ids * 0, ids, zeros, zeros, zeros, zeros)
    nothing = torch.zeros(1, 1, n)
    index = np.array([source, target], dtype=np.int64).reshape(2, -1)
    return AttributionGraph(
        nodes, index, np.asarray(weight, dtype=np.float32), ids, Attribution(nothing, nothing, nothing > 0)
    )


def sparse_graph(n: int, degree: float, seed: int) -> AttributionGraph:
    """Random signed edges, possibly none, possibly several pieces; no edge twice and none to itself."""
    rng = np.random.default_rng(seed)
    pairs = {(int(i), int(j)) for i, j in rng.integers(n, size=(round(degree * n), 2)) if i != j}
    source, target = ([pair[side] for pair in sorted(pairs)] for side in (0, 1))
    return feature_graph(n, source, target, rng.standard_normal(len(pairs)))


def planted_graph(sizes: list[int], seed: int, inside: float = 0.5, outside: float = 0.02) -> AttributionGraph:
    """Groups of nodes with many edges inside and few between, in shuffled order; `nodes.layer` says the group."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    chance = np.where(group[:, None] == group[None], inside, outside)
    source, target = np.nonzero((rng.random((n, n)) < chance) & ~np.eye(n, dtype=bool))
    graph = feature_graph(n, source, target, rng.uniform(0.5, 1.5, len(source)) * rng.choice([-1, 1], len(source)))
    graph.nodes.layer[:] = group
    return graph

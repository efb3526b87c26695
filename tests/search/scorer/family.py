"""Small attribution graphs whose circuit only their edges give away."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN, Attribution, AttributionGraph, Nodes
from hagd.config.stages import HierarchyConfig
from hagd.hierarchy.partition import build_hierarchy
from hagd.hierarchy.records import Hierarchy, nodes_key
from hagd.search.scorer.inputs import scored_graph
from hagd.search.scorer.records import ScoredGraph

N_LAYERS = 2
N_SLOTS = 3
N_HUBS = 8
N_NODES = 80
N_FEATURES = N_HUBS + N_NODES


class Member(NamedTuple):
    """One graph of the family, its hierarchy and its target `[n_candidates]`."""

    graph: AttributionGraph
    hierarchy: Hierarchy
    target: np.ndarray

    def scored(self, name: str = "member") -> ScoredGraph:
        return scored_graph(self.graph, self.hierarchy, self.target, name, N_LAYERS)


def member(seed: int) -> Member:
    """Hubs in layer 1, half of them with an edge to the logit; nodes in layer 0, each with edges to three hubs.

    The circuit is the hubs that reach the logit and the nodes whose hubs do. The others' hubs have their edge to a
    feature beside the logit, so degrees and weights are alike on both sides; importance is the target under noise.
    """
    rng = np.random.default_rng(seed)
    hubs = rng.permutation(N_HUBS).reshape(2, -1)
    inside = rng.integers(0, 2, N_NODES)
    target = np.concatenate([np.isin(np.arange(N_HUBS), hubs[1]), inside, [0]]).astype(np.float32)
    aside, logit = N_FEATURES, N_FEATURES + 1 + 2 * N_SLOTS
    edges = [(hub, logit if target[hub] else aside) for hub in range(N_HUBS)]
    edges += [(N_HUBS + i, hub) for i in range(N_NODES) for hub in rng.choice(hubs[inside[i]], 3, replace=False)]
    edges += [(other, hub) for other in range(aside + 1, logit) for hub in range(N_HUBS)]
    graph = _graph(rng, target, np.array(edges).T)
    order = np.argsort(-graph.nodes.importance[: len(target)], kind="stable")
    graph = relabelled(graph, np.concatenate([order, np.arange(len(target), len(graph.nodes))]))
    return Member(graph, build_hierarchy(graph, HierarchyConfig(), seed=0), target[order])


def _graph(rng: np.random.Generator, target: np.ndarray, edge_index: np.ndarray) -> AttributionGraph:
    n_candidates = len(target)
    n_other = 2 * N_SLOTS + 1
    importance = 0.4 * target + rng.random(n_candidates)
    signed = importance * rng.choice([-1, 1], n_candidates)
    slots = np.arange(N_SLOTS)
    kind = np.repeat([FEATURE, ERROR, TOKEN, LOGIT], [n_candidates, N_SLOTS, N_SLOTS, 1])
    kind[N_FEATURES] = HEAD  # the one beside the logit
    nodes = Nodes(
        kind=kind,
        layer=np.concatenate([np.arange(n_candidates) < N_HUBS, np.zeros(N_SLOTS), [-1] * N_SLOTS, [N_LAYERS]]).astype(
            int
        ),
        slot=np.concatenate([rng.integers(0, N_SLOTS, n_candidates), slots, slots, [N_SLOTS - 1]]),
        feature=np.concatenate([np.arange(n_candidates), np.zeros(n_other, dtype=int)]),
        attribution=np.pad(signed, (0, n_other)),
        importance=np.pad(importance, (0, n_other)),
        mean=np.pad(rng.random(n_candidates), (0, n_other)),
        frequency=np.pad(rng.random(n_candidates), (0, n_other), constant_values=1),
    )
    weights = (rng.normal(1, 0.1, edge_index.shape[1]) * rng.choice([-1, 1], edge_index.shape[1])).astype(np.float32)
    flat = np.sort(rng.choice(N_LAYERS * N_SLOTS * 64, n_candidates, replace=False))
    nothing = torch.zeros(N_LAYERS, N_SLOTS, 64)
    return AttributionGraph(nodes, edge_index, weights, flat, Attribution(nothing, nothing, nothing.bool()))


def relabelled(graph: AttributionGraph, order: np.ndarray) -> AttributionGraph:
    """The same graph with its nodes in another `order`, features still first, and its edges reversed in theirs."""
    new = np.argsort(order)
    nodes = Nodes(**{field.name: getattr(graph.nodes, field.name)[order] for field in dataclasses.fields(Nodes)})
    edge_index = new[graph.edge_index][:, ::-1]
    return dataclasses.replace(
        graph,
        nodes=nodes,
        edge_index=edge_index,
        edge_attr=graph.edge_attr[::-1],
        flat=graph.flat[order[: graph.n_candidates]],
    )


def renumbered(
    graph: AttributionGraph, hierarchy: Hierarchy, seed: int
) -> tuple[AttributionGraph, Hierarchy, np.ndarray]:
    """Features, other nodes and supernodes under other numbers, and the old number of every feature."""
    rng = np.random.default_rng(seed)
    n, n_candidates = len(graph.nodes), graph.n_candidates
    order = np.concatenate([rng.permutation(n_candidates), n_candidates + rng.permutation(n - n_candidates)])
    levels = tuple(
        dataclasses.replace(level, supernode=rng.permutation(level.n_supernodes)[level.supernode][order])
        for level in hierarchy.levels
    )
    graph = relabelled(graph, order)
    hierarchy = dataclasses.replace(hierarchy, levels=levels, nodes_key=nodes_key(graph))
    return graph, hierarchy, order[:n_candidates]

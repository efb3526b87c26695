"""How well methods tell a mechanism's nodes from all other live nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from hagd.attribution.graph import build_graph
from hagd.attribution.node_attribution import attribute_nodes
from hagd.config.stages import GraphConfig, HierarchyConfig, SearchConfig
from hagd.hierarchy.partition import build_hierarchy
from hagd.patching.objective import Objective
from hagd.search.find_circuit import Searched, find_circuit
from tests.ground_truth.mechanisms import Mechanism

SIZES = (10, 20, 50, 100, 200)
GRAPH = GraphConfig(edge_prompts=16, n_max=100_000)


@dataclass(frozen=True)
class Recovered:
    """What one method found.

    Attributes:
        auroc: of node membership over all live nodes, by the method's ranking.
        recall: share of the mechanism in the circuit of its size.
        evaluations: model evaluations.
    """

    auroc: float
    recall: float
    evaluations: float


def prepare(mechanism: Mechanism, seed: int = 0) -> Searched:
    """Graph and hierarchy, as an extraction makes them."""
    patched, task = mechanism.patched, mechanism.task
    loss = SearchConfig().loss
    discovery, selection = (
        Objective(patched, task, split, ablation="mean", error="mean", batch_size=256, loss=loss)
        for split in (task.discovery, task.selection)
    )
    graph = build_graph(patched, task, task.discovery, attribute_nodes(discovery, GRAPH), GRAPH)
    hierarchy = build_hierarchy(graph, HierarchyConfig(), seed)
    return Searched(discovery, selection, graph, hierarchy, GRAPH)


def recover(mechanism: Mechanism, searched: Searched, config: SearchConfig, seed: int = 0) -> Recovered:
    """Run a method whose circuit may have as many nodes as the mechanism."""
    members = mechanism.members.flatten()[torch.as_tensor(searched.graph.flat)].numpy()
    size = int(members.sum())
    options = config.model_copy(update={"n_nodes": size})
    result = find_circuit(searched, options, seed)
    inside = np.isin(searched.graph.flat, result.circuit.nodes)
    return Recovered(auroc(result.score, members), float(members[inside].mean()), result.evaluations)


def auroc(score: np.ndarray, members: np.ndarray) -> float:
    """Probability that a member scores above another node, ties half (Mann–Whitney)."""
    ranks, n = rankdata(score)[members], int(members.sum())
    return float((ranks.sum() - n * (n + 1) / 2) / (n * (len(score) - n)))

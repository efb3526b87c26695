"""Rankings of candidates that need no search, and their circuits: every table's controls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import AttributionGraph
from hagd.config.stages import AttributionMethod, GraphConfig
from hagd.patching.objective import Objective
from hagd.search.gates import scatter
from hagd.search.records import Circuit


def by_attribution(graph: AttributionGraph) -> np.ndarray:
    """The attribution that built the graph, `[n_candidates]`."""
    return graph.nodes.importance[: graph.n_candidates].astype(np.float64)


def by_method(
    objective: Objective, graph: AttributionGraph, config: GraphConfig, method: AttributionMethod
) -> np.ndarray:
    """Another attribution method than the one that built the graph, `[n_candidates]`."""
    if method == config.attribution:
        return by_attribution(graph)
    other = attribute_nodes(objective, config.model_copy(update={"attribution": method}))
    return other.importance.flatten().cpu().numpy()[graph.flat].astype(np.float64)


def best_circuit(graph: AttributionGraph, ranking: np.ndarray, size: int) -> Circuit:
    """The `size` best candidates of a ranking `[n_candidates]`, larger is better; of equal ones the first."""
    return Circuit(np.sort(graph.flat[np.argsort(-ranking, kind="stable")[:size]]))


def by_chance(graph: AttributionGraph, seed: int) -> np.ndarray:
    """A random ranking, `[n_candidates]`."""
    return np.random.default_rng(seed).permutation(graph.n_candidates).astype(np.float64)


def by_greedy_pruning(
    objective: Objective,
    graph: AttributionGraph,
    generator: torch.Generator,
    prompts: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """ACDC on nodes (Conmy et al. 2023): visit nodes from the least attributed up and ablate each for good if the
    divergence rises by less than a threshold.

    A single threshold gives a single size; here the rise is recorded instead and every node but those that raise it
    by more than the mean stays ablated, so the rises rank all nodes. `[n_candidates]`; one evaluation of `prompts` a
    node.
    """
    flat = torch.as_tensor(graph.flat)
    shape = objective.patched.gate_shape
    index = objective.sample(prompts, generator)
    order = np.argsort(by_attribution(graph), kind="stable")
    kept = torch.ones(len(flat))
    rises = np.zeros(len(flat))
    empty = float(objective.losses(scatter(torch.zeros(len(flat)), flat, shape)[None], index)[0])
    threshold = empty / len(flat)
    before = float(objective.losses(scatter(kept, flat, shape)[None], index)[0])
    for done, node in enumerate(order.tolist()):
        kept[node] = 0.0
        after = float(objective.losses(scatter(kept, flat, shape)[None], index)[0])
        rises[node] = after - before
        if rises[node] > threshold:
            kept[node] = 1.0
        else:
            before = after
        if progress is not None:
            progress(done + 1, len(order))
    return rises

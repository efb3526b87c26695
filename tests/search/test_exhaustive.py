from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from hagd.config.stages import GraphConfig, HierarchyConfig, SearchConfig
from hagd.errors import ConfigError
from hagd.hierarchy.partition import build_hierarchy
from hagd.search.exhaustive import best_circuits
from hagd.search.find_circuit import Searched, find_circuit
from hagd.search.records import SearchResult
from tests.search.test_find_circuit import first_features
from tests.search.trained import Trained


@pytest.fixture(scope="module")
def searched(trained: Trained) -> Searched:
    graph = first_features(trained.graph, 9)
    hierarchy = build_hierarchy(graph, HierarchyConfig(), 0)
    return Searched(trained.objective, trained.objective, graph, hierarchy, GraphConfig())


def find(searched: Searched, method: str) -> SearchResult:
    return find_circuit(searched, SearchConfig(method=method, n_nodes=4, sizes=(2, 6), gate_steps=60), 0)  # type: ignore[arg-type]


def test_no_circuit_of_its_size_is_better(searched: Searched) -> None:
    result = find(searched, "exhaustive")
    objective, flat = searched.discovery, searched.graph.flat
    index = torch.arange(len(objective))

    def loss(nodes: np.ndarray) -> float:
        gates = torch.zeros(objective.patched.gate_shape)
        gates.view(-1)[torch.as_tensor(nodes)] = 1
        return float(objective.loss(gates, index))

    for circuit in result.circuits:
        every = [loss(flat[list(members)]) for members in combinations(range(9), len(circuit))]
        assert loss(circuit.nodes) == pytest.approx(min(every), rel=1e-4)
        assert max(every) > 1.01 * min(every)
    assert result.steps[0].evaluations == 36 + 126 + 84
    assert sorted(np.flatnonzero(result.score == 3)) == sorted(
        set.intersection(*(set(np.flatnonzero(np.isin(flat, c.nodes))) for c in result.circuits))
    )
    ours = find(searched, "hagd")
    for found, best in zip(ours.circuits, result.circuits, strict=True):
        assert loss(found.nodes) >= loss(best.nodes) - 1e-6


def test_too_many_candidates(searched: Searched, trained: Trained) -> None:
    with pytest.raises(ConfigError, match=r"search\.method=exhaustive: expected at most 20 candidates, found 21; set"):
        best_circuits(trained.objective, trained.graph.flat[:21], [3])
    graph = replace(searched.graph, flat=searched.graph.flat[:9])
    found = best_circuits(trained.objective, graph.flat, [9])
    assert np.array_equal(found[9], np.arange(9))

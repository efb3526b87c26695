from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.hierarchy.affinity import affinity
from tests.hierarchy.graphs import sparse_graph


def slow_affinity(edge_index: np.ndarray, edge_attr: np.ndarray, n: int) -> np.ndarray:
    w = np.zeros((n, n))
    for (i, j), value in zip(edge_index.T.tolist(), edge_attr.tolist(), strict=True):
        if i != j:
            w[i, j] += 0.5 * abs(value)
            w[j, i] += 0.5 * abs(value)
    return w


@given(n=st.integers(1, 30), degree=st.sampled_from([0, 0.5, 3]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_affinity_is_the_symmetric_absolute_weight(n: int, degree: float, seed: int) -> None:
    graph = sparse_graph(n, degree, seed)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    np.testing.assert_allclose(w.toarray(), slow_affinity(graph.edge_index, graph.edge_attr, n), rtol=1e-6)


def test_affinity_drops_loops() -> None:
    w = affinity(np.array([[0, 0], [0, 1]]), np.array([5.0, -2.0]), 2).toarray()
    assert w.tolist() == [[0, 1], [1, 0]]

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_prompt_graph import made_graph
from scipy.sparse import csr_array

from hagd.attribution.records import ERROR, HEAD, LOGIT, TOKEN, AttributionGraph
from hagd.config.stages import HierarchyConfig
from hagd.hierarchy import affinity as affinities
from hagd.hierarchy.affinity import (
    affinity,
    attribution_affinity,
    edge_affinity,
    influence_affinity,
    nearest,
    profile_affinity,
    target_affinity,
)
from hagd.hierarchy.partition import build_prompt_hierarchy
from hagd.hierarchy.records import nodes_key
from tests.hierarchy.graphs import feature_graph, sparse_graph


def slow_affinity(edge_index: np.ndarray, edge_attr: np.ndarray, n: int) -> np.ndarray:
    w = np.zeros((n, n))
    for (i, j), value in zip(edge_index.T.tolist(), edge_attr.tolist(), strict=True):
        if i != j:
            w[i, j] += 0.5 * abs(value)
            w[j, i] += 0.5 * abs(value)
    return w


def slow_nearest(x: np.ndarray, k: int) -> np.ndarray:
    """Cosines of all pairs, the k largest positive ones of each row, the first of those that are equal."""
    norms = np.linalg.norm(x, axis=1)
    unit = x / np.where(norms > 0, norms, 1)[:, None]
    cosine = unit @ unit.T
    w = np.zeros_like(cosine)
    for i in range(len(x)):
        positive = (j for j in range(len(x)) if j != i and cosine[i, j] > 1e-9)
        others = sorted(positive, key=lambda j: (-round(cosine[i, j], 9), j))
        for j in others[:k]:
            w[i, j] += cosine[i, j] / 2
            w[j, i] += cosine[i, j] / 2
    return w


def mixed_graph(seed: int) -> AttributionGraph:
    """Features and heads 0 to 7, an error, a token and the logit, with importances."""
    rng = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(11) for j in range(8) if i != j and i != 10 and rng.random() < 0.5]
    pairs += [(i, 10) for i in range(10)]
    graph = feature_graph(11, *zip(*pairs, strict=True), rng.standard_normal(len(pairs)))
    graph.nodes.kind[6:] = (HEAD, HEAD, ERROR, TOKEN, LOGIT)
    graph.nodes.importance[:8] = rng.random(8)
    return graph


def test_a_prompts_graph_is_divided_by_influence_between_features_heads_and_errors() -> None:
    graph = made_graph()
    inner = [row for row, kind in enumerate(graph.nodes.kind.tolist()) if kind not in (TOKEN, LOGIT)]
    kept = np.isin(graph.edge_index, inner).all(0)
    expected = slow_affinity(graph.edge_index[:, kept], graph.edge_influence[kept], len(graph.nodes))
    np.testing.assert_allclose(influence_affinity(graph).toarray(), expected, rtol=1e-6)
    hierarchy = build_prompt_hierarchy(graph, HierarchyConfig(branching=2, min_size=2), 0)
    assert hierarchy.nodes_key == nodes_key(graph) and hierarchy.levels[-1].n_supernodes > 1
    assert len(hierarchy.levels[0].supernode) == len(graph.nodes)


@given(n=st.integers(1, 30), degree=st.sampled_from([0, 0.5, 3]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_affinity_is_the_symmetric_absolute_weight(n: int, degree: float, seed: int) -> None:
    graph = sparse_graph(n, degree, seed)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    np.testing.assert_allclose(w.toarray(), slow_affinity(graph.edge_index, graph.edge_attr, n), rtol=1e-6)


def test_affinity_drops_loops() -> None:
    w = affinity(np.array([[0, 0], [0, 1]]), np.array([5.0, -2.0]), 2).toarray()
    assert w.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_edges_leave_tokens_and_the_logit_alone(seed: int) -> None:
    graph = mixed_graph(seed)
    inner = (graph.edge_index < 9).all(0)
    expected = slow_affinity(graph.edge_index[:, inner], graph.edge_attr[inner], 11)
    np.testing.assert_allclose(edge_affinity(graph).toarray(), expected, rtol=1e-6)
    assert not expected[9:].any() and expected[8].any()


@pytest.mark.parametrize("seed", range(3))
def test_attribution_of_a_target_is_divided_over_its_incoming_edges(seed: int) -> None:
    graph = mixed_graph(seed)
    expected = np.zeros((11, 11))
    edges = list(zip(*graph.edge_index.tolist(), graph.edge_attr.tolist(), strict=True))
    for i, j, value in edges:
        if i < 9 and j < 9:
            incoming = sum(abs(other) for _, target, other in edges if target == j)
            expected[i, j] += abs(value) / incoming * graph.nodes.importance[j]
    np.testing.assert_allclose(attribution_affinity(graph).toarray(), (expected + expected.T) / 2, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_targets_compare_outgoing_edges(seed: int) -> None:
    graph = mixed_graph(seed)
    profile = np.zeros((11, 11))
    for i, j, value in zip(*graph.edge_index.tolist(), graph.edge_attr.tolist(), strict=True):
        profile[i, j] = value if i < 9 and j < 9 else 0
    profile /= np.maximum(np.bincount(graph.edge_index[1], np.abs(graph.edge_attr), 11), 1e-30)
    np.testing.assert_allclose(target_affinity(graph, 3).toarray(), slow_nearest(profile, 3), rtol=1e-5, atol=1e-9)


@given(n=st.integers(1, 25), k=st.integers(1, 6), share=st.sampled_from([0.2, 1.0]), seed=st.integers(0, 999))
@example(n=20, k=1, share=0.2, seed=2)  # rows 0 and 2 are parallel, so equally near to row 8
@settings(max_examples=50, deadline=None)
def test_nearest_is_that_of_all_pairs(n: int, k: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 7)) * (rng.random((n, 7)) < share)
    found = nearest(csr_array(x), k)
    np.testing.assert_allclose(found.toarray(), slow_nearest(x, k), atol=1e-9)


def test_nearest_is_the_same_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = csr_array(np.random.default_rng(0).standard_normal((40, 5)))
    whole = nearest(x, 4).toarray()
    monkeypatch.setattr(affinities, "_PRODUCTS_AT_ONCE", 300)
    assert np.array_equal(nearest(x, 4).toarray(), whole)


def test_profiles_join_features_only() -> None:
    x = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    w = profile_affinity(x, 9, 2).toarray()
    assert w.shape == (9, 9) and not w[6:].any()
    np.testing.assert_allclose(w[:6, :6], slow_nearest(x.astype(np.float64), 2), atol=1e-9)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.hierarchy import spectral
from hagd.hierarchy.spectral import affinity, spectral_split
from tests.hierarchy.graphs import planted_graph, sparse_graph


def slow_affinity(edge_index: np.ndarray, edge_attr: np.ndarray, n: int) -> np.ndarray:
    w = np.zeros((n, n))
    for (i, j), value in zip(edge_index.T.tolist(), edge_attr.tolist(), strict=True):
        if i != j:
            w[i, j] += 0.5 * abs(value)
            w[j, i] += 0.5 * abs(value)
    return w


def same_groups(one: np.ndarray, other: np.ndarray) -> bool:
    return len(set(zip(one.tolist(), other.tolist(), strict=True))) == len(set(one)) == len(set(other))


@given(n=st.integers(1, 30), degree=st.sampled_from([0, 0.5, 3]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_affinity_is_the_symmetric_absolute_weight(n: int, degree: float, seed: int) -> None:
    graph = sparse_graph(n, degree, seed)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    np.testing.assert_allclose(w.toarray(), slow_affinity(graph.edge_index, graph.edge_attr, n), rtol=1e-6)


def test_affinity_drops_loops() -> None:
    w = affinity(np.array([[0, 0], [0, 1]]), np.array([5.0, -2.0]), 2).toarray()
    assert w.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("n", [100, 400])
def test_the_sparse_solver_agrees_with_the_dense_one(n: int) -> None:
    graph = sparse_graph(n, 6, seed=0)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    normalised = spectral._normalised_affinity(w)
    values, vectors = spectral._smallest(normalised, 5, seed=0)
    dense_values, dense_vectors = np.linalg.eigh(np.eye(n) - normalised.toarray())
    np.testing.assert_allclose(values, dense_values[:5], atol=1e-3)
    overlap = np.abs((vectors * dense_vectors[:, :5]).sum(0))
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_the_normalised_affinity_is_the_definition() -> None:
    graph = sparse_graph(40, 2, seed=1)
    w = affinity(graph.edge_index, graph.edge_attr, 40).toarray()
    degree = w.sum(1)
    ridge = 0.01 * degree.mean()
    expected = (w + ridge * np.eye(40)) / np.sqrt(np.outer(degree + ridge, degree + ridge))
    found = spectral._normalised_affinity(affinity(graph.edge_index, graph.edge_attr, 40))
    np.testing.assert_allclose(found.toarray(), expected)
    assert np.linalg.eigvalsh(np.eye(40) - expected).min() > -1e-9


@pytest.mark.parametrize("sizes", [[20, 20, 20], [10, 25], [60, 50, 40, 50]])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_clusters_are_found(sizes: list[int], seed: int) -> None:
    graph = planted_graph(sizes, seed)
    w = affinity(graph.edge_index, graph.edge_attr, len(graph.nodes))
    split = spectral_split(w, len(sizes), seed)
    assert same_groups(split.clusters, graph.nodes.layer)
    assert split.eigengap > 0.1


@given(
    n=st.integers(2, 150),
    degree=st.sampled_from([0, 0.3, 1, 4]),
    branching=st.integers(2, 6),
    largest=st.sampled_from([0.0, 0.95]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_a_split_makes_progress(n: int, degree: float, branching: int, largest: float, seed: int) -> None:
    graph = sparse_graph(n, degree, seed)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    split = spectral_split(w, branching, seed, largest)
    sizes = np.bincount(split.clusters, minlength=1)
    assert split.clusters.shape == (n,) and split.clusters.dtype == np.int64
    assert 2 <= len(sizes) <= branching and (sizes > 0).all(), "numbered without gaps"
    if largest == 0:
        assert sizes.max() <= -(-n // branching)
    else:
        assert sizes.max() < n
    assert np.isfinite(split.eigengap) and split.eigengap >= -1e-3
    again = spectral_split(w, branching, seed, largest)
    assert np.array_equal(split.clusters, again.clusters) and split.eigengap == again.eigengap


def test_identical_nodes_can_be_split() -> None:
    """A complete graph has no structure, and its eigenvectors may coincide."""
    w = affinity(*complete(30), 30)
    assert np.bincount(spectral_split(w, 4, seed=0).clusters).max() < 30


def test_pieces_that_do_not_touch_can_be_split() -> None:
    """More pieces than clusters, each of them small: eigenvalue 0 many times over."""
    n = 120
    index = np.array([[i, i + 1] for i in range(0, n, 2)]).T
    w = affinity(index, np.ones(n // 2), n)
    clusters = spectral_split(w, 4, seed=0).clusters
    assert 2 <= len(set(clusters)) <= 4


def complete(n: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.array([(i, j) for i in range(n) for j in range(n) if i != j]).T
    return index, np.ones(index.shape[1])

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
from scipy.sparse import block_diag, csr_array

from hagd.hierarchy import spectral
from hagd.hierarchy.affinity import affinity
from hagd.hierarchy.spectral import normalised_affinity, spectral_embeddings
from tests.hierarchy.graphs import planted_graph, sparse_graph


def connected(n: int, seed: int) -> csr_array:
    """Random weights and a ring, so that there is one piece."""
    graph = sparse_graph(n, 6, seed)
    ring = affinity(np.array([np.arange(n), np.roll(np.arange(n), 1)]), np.full(n, 0.3), n)
    return (affinity(graph.edge_index, graph.edge_attr, n) + ring).tocsr()


def dense_embedding(w: csr_array, k: int) -> tuple[np.ndarray, float]:
    """The definition, by a full eigendecomposition of the Laplacian."""
    values, vectors = np.linalg.eigh(np.eye(w.shape[0]) - normalised_affinity(w).toarray())
    return vectors[:, :k], values[k] - values[k - 1]


def test_the_normalised_affinity_is_the_definition() -> None:
    w = connected(40, seed=1)
    dense = w.toarray()
    degree = dense.sum(1)
    ridge = 0.01 * degree.mean()
    expected = (dense + ridge * np.eye(40)) / np.sqrt(np.outer(degree + ridge, degree + ridge))
    np.testing.assert_allclose(normalised_affinity(w).toarray(), expected)
    assert np.linalg.eigvalsh(np.eye(40) - expected).min() > -1e-9


@pytest.mark.parametrize("k", [2, 4])
def test_parts_of_all_sizes_are_solved_as_by_dense_eigendecomposition(k: int) -> None:
    """Padded dense solves, Lanczos, and several parts of one size class in one matrix."""
    sizes = [k + 1, 9, 15, 16, 80, 96, 97, 300]
    assert max(sizes) > spectral._DENSE_UP_TO > min(sizes)
    graphs = [connected(n, seed) for seed, n in enumerate(sizes)]
    bounds = np.cumsum([0, *sizes]).tolist()
    parts = list(pairwise(bounds))
    found = spectral_embeddings(csr_array(block_diag(graphs)), parts, k, np.random.default_rng(0))
    for w, embedding in zip(graphs, found, strict=True):
        vectors, eigengap = dense_embedding(w, k)
        assert embedding.vectors.shape == vectors.shape
        overlap = np.abs((embedding.vectors * vectors).sum(0))
        np.testing.assert_allclose(overlap, 1, atol=2e-3)
        assert embedding.eigengap == pytest.approx(eigengap, abs=1e-3)


def test_a_chain_too_long_for_lanczos_still_gets_an_ordering() -> None:
    """Eigenvalues lie within 1e-6 of each other; what comes back must vary slowly along the chain."""
    n = 3000
    w = affinity(np.array([np.arange(n - 1), np.arange(1, n)]), np.ones(n - 1), n)
    (embedding,) = spectral_embeddings(w, [(0, n)], 2, np.random.default_rng(0))
    second = embedding.vectors[:, 1]
    assert np.isfinite(second).all() and np.linalg.norm(second) == pytest.approx(1, abs=1e-3)
    assert np.square(np.diff(second)).sum() < 1e-2, "2 for a random vector"


@pytest.mark.parametrize("seed", range(6))
def test_vectors_are_those_of_the_graph_also_where_lanczos_finds_some_of_them_only(seed: int) -> None:
    """Chains whose weights differ by two orders of magnitude; a random vector has a residual of 0.7."""
    n, rng = 1000, np.random.default_rng(seed)
    w = affinity(np.array([np.arange(n - 1), np.arange(1, n)]), 10 ** rng.uniform(-2, 0, n - 1), n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (embedding,) = spectral_embeddings(w, [(0, n)], 4, np.random.default_rng(seed))
    image = normalised_affinity(w) @ embedding.vectors
    residual = image - embedding.vectors * (embedding.vectors * image).sum(0)
    assert np.linalg.norm(residual, axis=0).max() < 0.01


def test_a_gap_marks_as_many_modules_as_there_are() -> None:
    graph = planted_graph([60, 50, 40, 50], seed=0)
    order = np.argsort(graph.nodes.layer, kind="stable")
    w = affinity(graph.edge_index, graph.edge_attr, 200)[order][:, order]
    gaps = {k: spectral_embeddings(w, [(0, 200)], k, np.random.default_rng(0))[0].eigengap for k in (2, 3, 4, 5)}
    assert max(gaps, key=lambda k: gaps[k]) == 4 and gaps[4] > 0.1

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hagd.hierarchy import division
from hagd.hierarchy.affinity import affinity
from hagd.hierarchy.division import arrange, divide
from hagd.hierarchy.quality import modularity
from hagd.hierarchy.spectral import normalised_affinity
from tests.hierarchy.graphs import planted_graph, sparse_graph


def split(w: csr_array, branching: int, seed: int, largest: float = 0.95) -> np.ndarray:
    """Child `[n]` of each node when the whole graph is divided once."""
    blocks = arrange(w, np.zeros(w.shape[0], dtype=np.int64))
    child, _ = divide(blocks, branching, 1, largest, np.random.default_rng(seed))
    by_node = np.empty_like(child)
    by_node[blocks.nodes] = child
    return by_node


def same_groups(one: np.ndarray, other: np.ndarray) -> bool:
    return len(set(zip(one.tolist(), other.tolist(), strict=True))) == len(set(one)) == len(set(other))


def dense_split(w: csr_array, branching: int, seed: int) -> np.ndarray:
    """The textbook: all eigenvectors of the dense Laplacian, rows of unit length, SciPy's k-means."""
    vectors = np.linalg.eigh(np.eye(w.shape[0]) - normalised_affinity(w).toarray())[1][:, :branching]
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kmeans2(rows, branching, minit="++", rng=np.random.default_rng(seed))[1]


@given(n=st.integers(1, 60), degree=st.sampled_from([0, 0.4, 1, 3]), groups=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_blocks_hold_every_affinity_within_a_supernode_and_no_other(
    n: int, degree: float, groups: int, seed: int
) -> None:
    graph = sparse_graph(n, degree, seed)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    supernode = np.unique(np.random.default_rng(seed).integers(groups, size=n), return_inverse=True)[1]
    blocks = arrange(w, supernode)
    assert sorted(blocks.nodes.tolist()) == list(range(n))
    kept = np.where(supernode[:, None] == supernode[None], w.toarray(), 0)
    np.testing.assert_allclose(blocks.w.toarray(), kept[blocks.nodes][:, blocks.nodes])
    for g, (start, stop) in enumerate(pairwise(blocks.bounds.tolist())):
        members = blocks.nodes[start:stop]
        assert (supernode[members] == g).all()
        _, piece = connected_components(csr_array(kept[members][:, members]), directed=False)
        assert same_groups(piece, blocks.piece[start:stop])
        sizes = np.bincount(blocks.piece[start:stop] - blocks.piece[start])
        assert (np.diff(sizes) <= 0).all() and (np.diff(blocks.piece[start:stop]) >= 0).all()


@pytest.mark.parametrize("sizes", [[20, 20, 20], [10, 25], [60, 50, 40, 50]])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_clusters_are_found(sizes: list[int], seed: int) -> None:
    graph = planted_graph(sizes, seed)
    w = affinity(graph.edge_index, graph.edge_attr, len(graph.nodes))
    assert same_groups(split(w, len(sizes), seed), graph.nodes.layer)


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("outside", [0.05, 0.2])
def test_divisions_are_as_modular_as_those_by_dense_eigendecomposition(n: int, outside: float) -> None:
    """Also where modules are blurred and no division is the obvious one."""
    ours, dense = [], []
    for seed in range(5):
        graph = planted_graph([n // 4] * 4, seed, inside=0.4, outside=outside)
        w = affinity(graph.edge_index, graph.edge_attr, len(graph.nodes))
        ours.append(modularity(w, split(w, 4, seed)))
        dense.append(modularity(w, dense_split(w, 4, seed)))
    assert np.mean(ours) >= np.mean(dense) - 0.005


@given(
    n=st.integers(2, 150),
    degree=st.sampled_from([0, 0.3, 1, 4]),
    branching=st.integers(2, 6),
    largest=st.sampled_from([0.0, 0.95]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_a_division_makes_progress(n: int, degree: float, branching: int, largest: float, seed: int) -> None:
    graph = sparse_graph(n, degree, seed)
    w = affinity(graph.edge_index, graph.edge_attr, n)
    child = split(w, branching, seed, largest)
    sizes = np.bincount(child)
    assert child.shape == (n,) and child.dtype == np.int64
    assert (sizes > 0).sum() >= 2 and child.max() < branching
    if largest == 0:
        assert sizes.max() <= -(-n // branching)
    else:
        assert sizes.max() < n
    assert np.array_equal(child, split(w, branching, seed, largest))


def test_a_complete_graph_can_be_divided() -> None:
    """It has no structure, and its eigenvectors may coincide."""
    index = np.array([(i, j) for i in range(30) for j in range(30) if i != j]).T
    assert np.bincount(split(affinity(index, np.ones(index.shape[1]), 30), 4, seed=0)).max() < 30


def test_pieces_are_divided_without_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty pairs and thirty lone nodes: whole pieces, evenly."""

    def refuse(*_: object) -> None:
        raise AssertionError("no eigenvectors are needed")

    monkeypatch.setattr(division, "spectral_embeddings", refuse)
    index = np.array([[i, i + 1] for i in range(0, 120, 2)]).T
    child = split(affinity(index, np.ones(60), 150), 4, seed=0)
    assert (child[index[0]] == child[index[1]]).all()
    assert np.ptp(np.bincount(child, minlength=4)) <= 1
    assert set(split(affinity(np.empty((2, 0), dtype=np.int64), np.empty(0), 9), 3, seed=0)) == {0, 1, 2}


def test_strays_are_a_child_of_their_own() -> None:
    graph = planted_graph([40, 40], seed=0)
    w = affinity(graph.edge_index, graph.edge_attr, 90)
    child = split(w, 3, seed=0)
    assert len(set(child[80:])) == 1 and child[80] not in child[:80]
    assert same_groups(child[:80], graph.nodes.layer)
    halves = split(w, 2, seed=0)
    assert set(halves[:80]) == {0} and set(halves[80:]) == {1}


def test_with_two_children_few_strays_do_not_take_a_place() -> None:
    graph = planted_graph([40, 44], seed=0)
    child = split(affinity(graph.edge_index, graph.edge_attr, 86), 2, seed=0)
    assert same_groups(child[:84], graph.nodes.layer)
    assert np.bincount(child).tolist() in ([42, 44], [44, 42]), "strays are with the smaller half"

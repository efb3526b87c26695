from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.config.stages import HierarchyConfig
from hagd.hierarchy import partition
from hagd.hierarchy.affinity import affinity
from hagd.hierarchy.division import Blocks, divide
from hagd.hierarchy.partition import build_hierarchy
from hagd.hierarchy.quality import conductance, modularity, supernode_edges
from tests.hierarchy.graphs import feature_graph, planted_graph, sparse_graph

Division = tuple[np.ndarray, list[float]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, float, HierarchyConfig, int]:
    config = HierarchyConfig(branching=draw(st.integers(2, 5)), min_size=draw(st.sampled_from([1, 2, 8])))
    return draw(st.integers(1, 120)), draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])), config, draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_levels_are_partitions_that_refine_each_other(case: tuple[int, float, HierarchyConfig, int]) -> None:
    n, degree, config, seed = case
    found = build_hierarchy(sparse_graph(n, degree, seed), config, seed)
    assert found.branching == config.branching
    parent = np.zeros(n, dtype=np.int64)
    for depth, level in enumerate(found.levels):
        assert level.supernode.shape == (n,) and level.supernode.dtype == np.int64
        assert sorted(set(level.supernode)) == list(range(level.n_supernodes)), "every supernode has members"
        children: dict[int, set[int]] = {}
        for above, below in zip(parent.tolist(), level.supernode.tolist(), strict=True):
            children.setdefault(above, set()).add(below)
        assert sum(map(len, children.values())) == level.n_supernodes, "no supernode has two parents"
        assert max(map(len, children.values())) <= config.branching
        for above, below in children.items():
            size = int((parent == above).sum())
            assert (len(below) > 1) == (size > config.min_size) or len(found.levels) == 1, depth
        parent = level.supernode
    assert np.bincount(parent).max() <= config.min_size
    if n > config.min_size:
        assert len(found.levels) <= 2 * math.log(n, config.branching) + 2


@given(cases())
@settings(max_examples=40, deadline=None)
def test_supernode_edges_sum_member_edges(case: tuple[int, float, HierarchyConfig, int]) -> None:
    n, degree, config, seed = case
    graph = sparse_graph(n, degree, seed)
    for level in build_hierarchy(graph, config, seed).levels:
        expected = np.zeros((level.n_supernodes, level.n_supernodes))
        for (i, j), value in zip(graph.edge_index.T.tolist(), graph.edge_attr.tolist(), strict=True):
            expected[level.supernode[i], level.supernode[j]] += value
        np.testing.assert_allclose(supernode_edges(graph, level.supernode).toarray(), expected, rtol=1e-4, atol=1e-5)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_hierarchy(case: tuple[int, float, HierarchyConfig, int]) -> None:
    n, degree, config, seed = case
    graph = sparse_graph(n, degree, seed)
    one, other = (build_hierarchy(graph, config, seed) for _ in range(2))
    assert len(one.levels) == len(other.levels)
    for a, b in zip(one.levels, other.levels, strict=True):
        assert np.array_equal(a.supernode, b.supernode)
        assert (a.modularity, a.conductance, a.eigengap) == (b.modularity, b.conductance, b.eigengap)


def test_a_small_graph_is_one_supernode() -> None:
    found = build_hierarchy(sparse_graph(8, 2, 0), HierarchyConfig(branching=4, min_size=8), seed=0)
    (level,) = found.levels
    assert level.n_supernodes == 1 and level.supernode.tolist() == [0] * 8


@pytest.mark.parametrize("seed", range(3))
def test_planted_modules_make_the_levels(seed: int) -> None:
    graph = planted_graph([16, 18, 20], seed)
    found = build_hierarchy(graph, HierarchyConfig(branching=3, min_size=20), seed)
    (level,) = found.levels
    assert len({(a, b) for a, b in zip(level.supernode.tolist(), graph.nodes.layer.tolist(), strict=True)}) == 3
    assert level.modularity > 0.4 and level.conductance < 0.25 and level.eigengap > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_a_random_hierarchy_has_the_same_sizes_and_no_modules(seed: int) -> None:
    graph = planted_graph([16, 18, 20], seed)
    real, control = (
        build_hierarchy(graph, HierarchyConfig(affinity=name, branching=3, min_size=4), seed)
        for name in ("edges", "random")
    )
    w = affinity(graph.edge_index, graph.edge_attr, 54)
    parent = np.zeros(54, dtype=np.int64)
    for a, b in zip(real.levels, control.levels, strict=True):
        assert np.bincount(a.supernode).tolist() == np.bincount(b.supernode).tolist()
        assert not np.array_equal(a.supernode, b.supernode)
        assert b.modularity == pytest.approx(slow_modularity(w.toarray(), b.supernode), abs=1e-9)
        assert len({(above, below) for above, below in zip(parent, b.supernode, strict=True)}) == b.n_supernodes
        parent = b.supernode
    assert control.levels[0].modularity < 0.15 < real.levels[0].modularity


@pytest.mark.parametrize(("n", "branching", "uneven"), [(125, 5, 3), (124, 5, 3), (126, 5, 4), (216, 6, 3), (81, 3, 4)])
def test_so_many_levels_may_be_uneven(n: int, branching: int, uneven: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as an even division of all nodes would have, also where their number is a power of the branching."""
    shares: list[float] = []

    def peel(blocks: Blocks, branching: int, min_size: int, largest: float, rng: np.random.Generator) -> Division:
        """One node of every supernode to a child of its own, while that is allowed."""
        shares.append(largest)
        if largest == 0:
            return divide(blocks, branching, min_size, largest, rng)
        child = np.zeros(len(blocks.nodes), dtype=np.int64)
        child[blocks.bounds[:-1][np.diff(blocks.bounds) > 1]] = 1
        return child, []

    monkeypatch.setattr(partition, "divide", peel)
    found = build_hierarchy(sparse_graph(n, 3, 0), HierarchyConfig(branching=branching, min_size=1), 0)
    assert sum(share > 0 for share in shares) == uneven
    assert len(found.levels) <= 2 * uneven


def test_progress_counts_nodes_that_need_no_further_division() -> None:
    seen: list[tuple[int, int]] = []
    build_hierarchy(
        sparse_graph(60, 3, 0), HierarchyConfig(branching=2, min_size=4), 0, lambda done, n: seen.append((done, n))
    )
    assert seen[-1] == (60, 60) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def slow_modularity(w: np.ndarray, group: np.ndarray) -> float:
    total, degree = w.sum(), w.sum(1)
    q = 0.0
    for i in range(len(w)):
        for j in range(len(w)):
            if group[i] == group[j]:
                q += w[i, j] / total - degree[i] * degree[j] / total**2
    return q


def slow_conductance(w: np.ndarray, group: np.ndarray) -> float:
    values = []
    for g in range(group.max() + 1):
        inside = group == g
        cut = w[inside][:, ~inside].sum()
        smaller = min(w[inside].sum(), w[~inside].sum())
        if smaller > 0:
            values.append(cut / smaller)
    return float(np.mean(values)) if values else 0.0


@given(n=st.integers(2, 40), degree=st.sampled_from([0.3, 1, 4]), groups=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_modularity_and_conductance_are_those_of_loops(n: int, degree: float, groups: int, seed: int) -> None:
    graph = sparse_graph(n, degree, seed)
    group = np.unique(np.random.default_rng(seed).integers(groups, size=n), return_inverse=True)[1]
    w = affinity(graph.edge_index, graph.edge_attr, n)
    if w.sum() == 0:
        assert modularity(w, group) == conductance(w, group) == 0
        return
    assert modularity(w, group) == pytest.approx(slow_modularity(w.toarray(), group), abs=1e-9)
    assert conductance(w, group) == pytest.approx(slow_conductance(w.toarray(), group), abs=1e-9)


def test_modularity_and_conductance_are_those_of_networkx() -> None:
    graph = planted_graph([10, 12, 9], seed=3)
    w = affinity(graph.edge_index, graph.edge_attr, 31)
    group = graph.nodes.layer
    other = nx.from_scipy_sparse_array(w)
    members = [set(np.flatnonzero(group == g).tolist()) for g in range(3)]
    assert modularity(w, group) == pytest.approx(nx.community.modularity(other, members), abs=1e-9)
    expected = np.mean([nx.conductance(other, m, weight="weight") for m in members])
    assert conductance(w, group) == pytest.approx(float(expected), abs=1e-9)


def test_nodes_without_edges_leave_the_conductance_as_it_is() -> None:
    w = affinity(np.array([[0, 1, 0], [1, 2, 3]]), np.array([4.0, 1.0, 3.0]), 6)
    alone = conductance(w[:4][:, :4], np.array([0, 1, 1, 0]))
    assert 0 < alone == conductance(w, np.array([0, 1, 1, 0, 2, 3]))


def test_supernode_edges_keep_their_sign() -> None:
    graph = feature_graph(3, [0, 1, 0], [2, 2, 1], [2.0, -3.0, 5.0])
    summed = supernode_edges(graph, np.array([0, 0, 1])).toarray()
    assert summed.tolist() == [[5, -1], [0, 0]]

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN
from hagd.errors import ArtifactError
from hagd.hierarchy.quality import supernode_edges
from hagd.search.records import Circuit
from hagd.search.scorer.inputs import INPUTS, membership_target, scored_graph
from hagd.search.scorer.records import DOWN, NODE, NODE_BACK, SUPERNODE, SUPERNODE_BACK, UP, ScoredGraph
from tests.search.scorer.family import N_LAYERS, Member, member


@pytest.fixture(scope="module")
def one() -> Member:
    return member(0)


def edges(scored: ScoredGraph, kind: int) -> set[tuple[int, int]]:
    return set(map(tuple, scored.edge_index[:, scored.edge_type == kind].T.tolist()))


def column(scored: ScoredGraph, name: str) -> np.ndarray:
    return scored.inputs[:, INPUTS.index(name)].numpy()


def test_rows_are_nodes_and_the_supernodes_of_every_level(one: Member) -> None:
    scored = one.scored()
    n_supernodes = sum(level.n_supernodes for level in one.hierarchy.levels)
    assert len(one.hierarchy.levels) > 1
    assert scored.inputs.shape == (len(one.graph.nodes) + n_supernodes, len(INPUTS))
    assert column(scored, "supernode").sum() == n_supernodes
    assert np.array_equal(scored.inputs[:, -6:].sum(1), np.ones(len(scored.inputs)))
    kind = one.graph.nodes.kind
    for name, code in (("feature", FEATURE), ("head", HEAD), ("error", ERROR), ("token", TOKEN), ("logit", LOGIT)):
        assert np.array_equal(column(scored, name)[: len(kind)], kind == code) and (kind == code).any()
    assert scored.target.tolist() == one.target.tolist()
    assert scored.inputs.isfinite().all() and scored.inputs.abs().max() <= 1


def strongest(matrix: np.ndarray, target: int) -> list[int]:
    """Sources of the eight largest |entries| of a column, zeros aside."""
    column = np.abs(matrix[:, target])
    return [source for source in np.argsort(-column)[:8].tolist() if column[source]]


def test_messages_pass_both_ways_along_the_strongest_edges_into_each_node(one: Member) -> None:
    scored, graph, n = one.scored(), one.graph, len(one.graph.nodes)
    matrix = np.zeros((n, n))
    matrix[tuple(graph.edge_index)] = graph.edge_attr
    expected = {(source, target) for target in range(n) for source in strongest(matrix, target)}
    assert edges(scored, NODE) == expected
    assert len(expected) < graph.edge_index.shape[1]
    assert edges(scored, NODE_BACK) == {(target, source) for source, target in expected}


def test_every_edge_into_the_logit_is_kept(one: Member) -> None:
    graph = one.graph
    features, logit = np.arange(graph.n_candidates), len(graph.nodes) - 1
    into_logit = dataclasses.replace(
        graph,
        edge_index=np.stack([features, np.full_like(features, logit)]),
        edge_attr=np.linspace(0.1, 1, len(features), dtype=np.float32),
    )
    scored = scored_graph(into_logit, one.hierarchy, None, "into the logit", N_LAYERS)
    assert edges(scored, NODE) == {(feature, logit) for feature in features.tolist()}


def test_supernode_edges_are_the_sums_between_different_supernodes(one: Member) -> None:
    scored, offset, expected = one.scored(), len(one.graph.nodes), {}
    for level in one.hierarchy.levels:
        summed = supernode_edges(one.graph, level.supernode).toarray()
        np.fill_diagonal(summed, 0)
        for target in range(level.n_supernodes):
            for source in strongest(summed, target):
                share = abs(summed[source, target]) / np.abs(summed[:, target]).max()
                expected[offset + source, offset + target] = (1 + np.log10(share) / 4, np.sign(summed[source, target]))
        offset += level.n_supernodes
    assert edges(scored, SUPERNODE) == set(expected)
    assert edges(scored, SUPERNODE_BACK) == {(target, source) for source, target in expected}
    forward = scored.edge_type == SUPERNODE
    found = scored.edge_attr[forward]
    wanted = torch.tensor([expected[pair] for pair in map(tuple, scored.edge_index[:, forward].T.tolist())])
    torch.testing.assert_close(found, wanted.float())


def test_containment_is_a_tree_to_the_coarsest_level(one: Member) -> None:
    scored = one.scored()
    up = dict(edges(scored, UP))
    n, coarsest = len(one.graph.nodes), one.hierarchy.levels[0]
    assert len(up) == len(scored.inputs) - coarsest.n_supernodes
    assert edges(scored, DOWN) == {(parent, child) for child, parent in up.items()}
    for node in range(n):
        row = node
        while row in up:
            row = up[row]
        assert row == n + coarsest.supernode[node]


def test_sizes_of_importance_activations_and_edges_do_not_matter(one: Member) -> None:
    nodes = one.graph.nodes
    larger = dataclasses.replace(
        one.graph,
        nodes=dataclasses.replace(
            nodes, importance=nodes.importance * 8, attribution=nodes.attribution * 8, mean=nodes.mean * 4
        ),
        edge_attr=one.graph.edge_attr * 16,
    )
    found, expected = scored_graph(larger, one.hierarchy, None, "larger", N_LAYERS), one.scored()
    torch.testing.assert_close(found.inputs, expected.inputs)
    torch.testing.assert_close(found.edge_attr, expected.edge_attr)


def test_the_most_important_node_ranks_first(one: Member) -> None:
    scored = one.scored()
    best = int(one.graph.nodes.importance.argmax())
    assert column(scored, "importance_rank")[best] == 1
    importance = one.graph.nodes.importance[: one.graph.n_candidates]
    for name in ("importance_rank", "importance_position"):
        assert np.array_equal(np.argsort(column(scored, name)[: len(importance)]), np.argsort(importance))


def test_a_graph_without_edges_or_effects_has_finite_inputs(one: Member) -> None:
    nodes = one.graph.nodes
    nothing = np.zeros(len(nodes))
    empty = dataclasses.replace(
        one.graph,
        nodes=dataclasses.replace(nodes, importance=nothing, attribution=nothing, mean=nothing),
        edge_index=np.zeros((2, 0), dtype=np.int64),
        edge_attr=np.zeros(0, dtype=np.float32),
    )
    scored = scored_graph(empty, one.hierarchy, None, "empty", N_LAYERS)
    assert scored.inputs.isfinite().all()
    assert set(scored.edge_type.tolist()) == {UP, DOWN}
    assert scored.target.tolist() == [0] * one.graph.n_candidates


def test_membership_is_the_share_of_circuits() -> None:
    flat = np.array([7, 3, 9, 5])
    circuits = [
        Circuit(np.array([3])),
        Circuit(np.array([3, 7])),
        Circuit(np.array([1, 3, 7, 9])),
        Circuit(np.array([3, 9])),
    ]
    assert membership_target(circuits, flat).tolist() == [0.5, 1.0, 0.5, 0.0]


def test_a_hierarchy_of_another_graph_is_refused(one: Member) -> None:
    other = dataclasses.replace(one.hierarchy, nodes_key="0123456789abcdef")
    with pytest.raises(ArtifactError, match=f"key {one.hierarchy.nodes_key}, .* key 0123456789abcdef"):
        scored_graph(one.graph, other, None, "mixed up", N_LAYERS)

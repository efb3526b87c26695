from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hagd.search.scorer.apply import build_network, logits
from hagd.search.scorer.inputs import INPUTS, scored_graph
from hagd.search.scorer.network import CircuitScorer
from hagd.search.scorer.records import ScoredGraph
from tests.search.scorer.family import N_LAYERS, Member, member, renumbered


def network(edges: bool) -> CircuitScorer:
    """With a random head: at its initial zero nothing but importance would reach the scores."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_network({"n_inputs": len(INPUTS), "hidden": 16, "heads": 2, "n_layers": 2, "edges": edges})
        torch.nn.init.normal_(net.head[-1].weight)
    return net


def other_edges(scored: ScoredGraph) -> ScoredGraph:
    return dataclasses.replace(scored, edge_index=scored.edge_index.roll(1, dims=1), edge_attr=-scored.edge_attr)


@pytest.fixture(scope="module")
def one() -> Member:
    return member(0)


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_renumbering_nodes_and_supernodes_renumbers_the_scores(one: Member, edges: bool, seed: int) -> None:
    graph, hierarchy, order = renumbered(one.graph, one.hierarchy, seed)
    net = network(edges)
    before = logits(net, one.scored())
    after = logits(net, scored_graph(graph, hierarchy, None, "renumbered", N_LAYERS))
    assert before.std() > 0.1
    torch.testing.assert_close(after, before[torch.as_tensor(order)], rtol=1e-4, atol=1e-5)


def test_edges_change_the_scores_but_not_those_of_the_control(one: Member) -> None:
    scored = one.scored()
    assert (logits(network(True), scored) - logits(network(True), other_edges(scored))).abs().max() > 0.05
    assert torch.equal(logits(network(False), scored), logits(network(False), other_edges(scored)))


def test_the_control_sees_no_supernodes_and_no_other_nodes(one: Member) -> None:
    scored = one.scored()
    n = scored.n_candidates
    noise = torch.cat([scored.inputs[:n], torch.randn_like(scored.inputs[n:])])
    assert torch.equal(
        logits(network(False), scored), logits(network(False), dataclasses.replace(scored, inputs=noise))
    )


@pytest.mark.parametrize("edges", [True, False])
def test_an_untrained_scorer_ranks_as_importance_does(one: Member, edges: bool) -> None:
    untrained = build_network({"n_inputs": len(INPUTS), "hidden": 16, "heads": 2, "n_layers": 2, "edges": edges})
    importance = one.graph.nodes.importance[: one.graph.n_candidates]
    assert np.array_equal(logits(untrained, one.scored()).argsort().numpy(), np.argsort(importance))

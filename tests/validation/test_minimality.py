"""Figures of single nodes agree with circuits run by hand; outsiders are like the nodes that they stand beside."""

from __future__ import annotations

import numpy as np
import pytest

from hagd.patching.objective import Objective
from hagd.pipeline.pipeline import Pipeline
from hagd.search.records import Circuit
from hagd.validation.bench import Bench, Count
from hagd.validation.minimality import draw_pairs, minimality_metrics, share_beyond
from hagd.validation.random_circuits import cells, random_matched
from tests.hierarchy.graphs import feature_graph


@pytest.fixture(scope="module")
def bench(pipeline: Pipeline) -> Bench:
    return Bench.of(pipeline.patched, pipeline.get("prompts"), "mean", "mean", pipeline.config.validation, seed=0)


def measured(pipeline: Pipeline, bench: Bench, circuit: Circuit, n: int, seed: int = 0) -> dict[str, float]:
    return minimality_metrics(bench, pipeline.get("graph"), circuit, n, seed, Count(None, 0))


def test_figures_agree_with_nodes_removed_and_added_by_hand(pipeline: Pipeline, bench: Bench) -> None:
    task, circuit = pipeline.get("prompts"), pipeline.get("search").circuit
    on = Objective(pipeline.patched, task, task.validation, ablation="mean", error="mean", batch_size=7)
    low, high = (float(x.logit_difference.double().mean()) for x in (bench.empty, bench.full))

    def faithfulness(nodes: set[int]) -> float:
        outcome = on.outcome(Circuit(np.array(sorted(nodes), dtype=int)).gates(bench.gate_shape))
        return (float(outcome.logit_difference.double().mean()) - low) / (high - low)

    members = set(circuit.nodes.tolist())
    _, outsiders = draw_pairs(pipeline.get("graph"), circuit, 100, 0)
    inside = np.array([abs(faithfulness(members) - faithfulness(members - {v})) for v in members])
    outside = np.array([abs(faithfulness(members | {u}) - faithfulness(members)) for u in outsiders.tolist()])
    found = measured(pipeline, bench, circuit, 100)
    assert len(inside) == len(outside) == 8
    assert found["validation.node_effect"] == pytest.approx(inside.mean(), rel=1e-4)
    assert found["control.outsiders.node_effect"] == pytest.approx(outside.mean(), rel=1e-4)
    assert found["validation.minimality"] == (inside > np.quantile(outside, 0.95)).mean()
    for name in ("validation.minimality", "validation.node_effect", "control.outsiders.node_effect"):
        assert found[f"{name}.low"] <= found[name] <= found[f"{name}.high"]


def test_a_circuit_that_was_searched_needs_its_nodes_more_than_random_ones(pipeline: Pipeline, bench: Bench) -> None:
    circuit = pipeline.get("search").circuit
    random = [
        measured(pipeline, bench, other, 8, seed)["validation.minimality"]
        for seed, other in enumerate(random_matched(pipeline.get("graph"), circuit, 20, 0))
    ]
    assert np.mean(random) < 0.3 < measured(pipeline, bench, circuit, 8)["validation.minimality"]


def test_outsiders_are_outside_distinct_and_of_the_cells_of_the_members() -> None:
    graph = feature_graph(60, [], [], [])
    graph.nodes.layer[:], graph.nodes.slot[:] = np.arange(60) % 2, np.arange(60) % 3
    circuit = Circuit(np.arange(0, 36, 3))  # of slot 0, in both layers; 8 more such nodes are outside
    cell = cells(graph)
    for seed in range(20):
        members, outsiders = draw_pairs(graph, circuit, 4, seed)
        assert set(members) <= set(circuit.nodes) and not set(outsiders) & set(circuit.nodes)
        assert len(set(members)) == len(set(outsiders)) == 4
        assert sorted(cell[members]) == sorted(cell[outsiders])
    members, outsiders = draw_pairs(graph, circuit, 60, 0)
    assert set(members) == set(circuit.nodes) and len(set(outsiders)) == 12
    assert (cell[outsiders] == cell[0]).sum() + (cell[outsiders] == cell[3]).sum() == 8


def test_no_member_takes_the_outsider_that_another_one_is_like() -> None:
    graph = feature_graph(4, [], [], [])
    graph.nodes.slot[:] = [0, 1, 1, 2]
    for seed in range(20):
        members, outsiders = draw_pairs(graph, Circuit(np.array([0, 1])), 2, seed)
        assert dict(zip(members.tolist(), outsiders.tolist(), strict=True)) == {0: 3, 1: 2}
        members, outsiders = draw_pairs(graph, Circuit(np.array([0, 1, 3])), 3, seed)
        assert (members[0], outsiders.tolist()) == (1, [2]) and set(members) == {0, 1, 3}


def test_every_node_outside_counts_once_where_there_are_fewer_of_them() -> None:
    share = share_beyond(np.array([0.92, 0.0, 0.0]), np.array([0.0, 1.0]))
    assert share(np.arange(3)) == 0, "the 95th percentile of those outside is 0.95"
    assert share(np.array([0, 0, 2])) == pytest.approx(2 / 3), "beside the drawn ones is 0 alone"
    assert np.isnan(share(np.array([2, 2, 2])))
    assert np.isnan(share_beyond(np.full(3, np.nan), np.array([0.0, 1.0]))(np.arange(3)))


@pytest.mark.parametrize("n", [0, 5])
def test_no_figures_without_nodes_to_remove_or_to_add(pipeline: Pipeline, bench: Bench, n: int) -> None:
    everything = Circuit(np.sort(pipeline.get("graph").flat))
    assert measured(pipeline, bench, everything if n else pipeline.get("search").circuit, n) == {}

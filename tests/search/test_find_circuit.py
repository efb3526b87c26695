from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from hagd.attribution.records import FEATURE, AttributionGraph
from hagd.config.stages import GraphConfig, HierarchyConfig, SearchConfig
from hagd.errors import ConfigError
from hagd.hierarchy.partition import build_hierarchy
from hagd.search.baselines import by_attribution
from hagd.search.find_circuit import Searched, find_circuit
from hagd.search.pruning import not_pruned
from hagd.search.records import Circuit, SearchResult
from tests.search.trained import Trained

SMALL: dict[str, Any] = {
    "n_nodes": 20,
    "sizes": (10, 20, 40),
    "gate_steps": 60,
    "gate_batch": 40,
    "traversal_budget": 60,
    "pruning_budget": 120,
}
SIZES = (10, 20, 40, 10_000)
"""The last is beyond the candidates."""


@pytest.fixture(scope="module")
def searched(trained: Trained) -> Searched:
    hierarchy = build_hierarchy(trained.graph, HierarchyConfig(), 0)
    return Searched(trained.objective, trained.objective, trained.graph, hierarchy, GraphConfig())


def find(searched: Searched, seed: int = 0, **changes: Any) -> SearchResult:
    return find_circuit(searched, SearchConfig(**{**SMALL, **changes}), seed)


def divergence(searched: Searched, result: SearchResult) -> float:
    gates = result.circuit.gates(searched.discovery.patched.gate_shape)
    return float(searched.discovery.divergences(gates[None], torch.arange(len(searched.discovery)))[0])


@pytest.fixture(scope="module")
def of_every_size(searched: Searched) -> Callable[[str], SearchResult]:
    """The circuits of a method, found once."""
    return cache(lambda method: find(searched, method=method, sizes=SIZES))


@pytest.mark.parametrize("method", ["hagd", "gates", "attribution", "gradient_activation", "greedy", "random"])
def test_circuits_of_every_size_among_the_candidates(
    searched: Searched, of_every_size: Callable[[str], SearchResult], method: str
) -> None:
    result = of_every_size(method)
    assert result.method == method and result.size == 20
    assert [len(circuit) for circuit in result.circuits] == [10, 20, 40]
    for circuit in result.circuits:
        assert set(circuit.nodes) <= set(searched.graph.flat)
        assert np.array_equal(circuit.nodes, np.unique(circuit.nodes))
    assert result.score.shape == (searched.graph.n_candidates,) and np.isfinite(result.score).all()
    assert result.evaluations == pytest.approx(sum(step.evaluations for step in result.steps))


@pytest.mark.parametrize("method", ["hagd", pytest.param("gates", marks=pytest.mark.slow), "greedy", "random"])
def test_the_same_seed_gives_the_same_circuits(
    searched: Searched, of_every_size: Callable[[str], SearchResult], method: str
) -> None:
    first, again = of_every_size(method), find(searched, method=method, sizes=SIZES)
    for ours, theirs in zip(first.circuits, again.circuits, strict=True):
        assert np.array_equal(ours.nodes, theirs.nodes)
    assert [step.evaluations for step in first.steps] == [step.evaluations for step in again.steps]


def test_every_part_says_what_it_cost_and_changed(searched: Searched) -> None:
    before = searched.discovery.patched.evaluations
    result = find(searched, traversal=True)
    assert [step.name for step in result.steps] == ["scorer", "traversal", "elimination", "gates", "pruning"]
    assert result.steps[0].changed == 0 and result.steps[0].evaluations == 0
    assert all(0 <= step.changed <= 20 and step.preservation >= 0 for step in result.steps)
    assert result.steps[1].evaluations <= SMALL["traversal_budget"]
    assert 0 < result.steps[2].evaluations < 3 * 2 * searched.graph.n_candidates
    assert result.steps[4].evaluations <= SMALL["pruning_budget"]
    gates = result.steps[3].evaluations
    assert 3 * SMALL["gate_steps"] <= gates <= 3 * SMALL["gate_steps"] + 3 * len(result.circuits)
    # The ledger leaves out only its own measurements on the selection split, one a part.
    spent = (searched.discovery.patched.evaluations - before) / len(searched.discovery)
    assert spent == pytest.approx(result.evaluations + len(result.steps))


def test_the_search_beats_what_it_starts_from(searched: Searched) -> None:
    ours, attribution, chance = (
        divergence(searched, find(searched, method=method, gate_steps=200))
        for method in ("hagd", "attribution", "random")
    )
    assert ours < attribution < chance


def test_scores_of_a_scorer_are_the_start(searched: Searched) -> None:
    scores = np.random.default_rng(3).normal(size=searched.graph.n_candidates)
    off = {"elimination": False, "gates": False, "pruning": False}
    result = find(replace(searched, scores=scores), **off)
    assert result.steps[0].note == "meta-learned scorer"
    plain = find(searched, **off)
    assert set(plain.circuit.nodes) == set(searched.graph.flat[np.argsort(-by_attribution(searched.graph))[:20]])
    assert "no meta-learned scorer" in plain.steps[0].note
    # The elimination begins with its better half, some rounds later.
    spent = [
        find(each, gates=False, pruning=False).steps[1].evaluations
        for each in (replace(searched, scores=scores), searched)
    ]
    assert 0 < spent[0] < spent[1]


@pytest.mark.parametrize("budget", ["traversal_budget", "pruning_budget"])
def test_a_part_without_budget_does_not_run(searched: Searched, budget: str) -> None:
    off = {"elimination": False, "gates": False}
    names = [step.name for step in find(searched, traversal=True, **off, **{budget: 0}).steps]
    assert budget.removesuffix("_budget") not in names


def test_without_gates_the_choice_of_rankings_is_counted(searched: Searched) -> None:
    before = searched.discovery.patched.evaluations
    result = find(searched, gates=False, pruning=False)
    assert [step.name for step in result.steps] == ["scorer", "elimination", "choice"]
    assert result.steps[2].evaluations == 2 * len(result.circuits)
    spent = (searched.discovery.patched.evaluations - before) / len(searched.discovery)
    assert spent == pytest.approx(result.evaluations + len(result.steps))


def test_fewer_prompts_a_test_let_the_same_budget_exchange_more(searched: Searched) -> None:
    budget = 20  # less than a round on all prompts: 20 members, 20 outsiders and the trials
    notes = [find(searched, gates=False, pruning_budget=budget, pruning_prompts=n).steps[-1].note for n in (256, 4)]
    assert notes[0].startswith("0 nodes") and not notes[1].startswith("0 nodes")


def test_a_circuit_of_every_candidate(searched: Searched) -> None:
    n = searched.graph.n_candidates
    result = find(searched, n_nodes=n)
    assert np.array_equal(result.circuit.nodes, np.sort(searched.graph.flat))


def test_too_many_nodes(searched: Searched) -> None:
    n = searched.graph.n_candidates
    with pytest.raises(ConfigError, match=rf"search\.n_nodes: expected at most {n} .* found {n + 1}; lower it$"):
        find(searched, n_nodes=n + 1)
    cut = replace(searched, graph_config=searched.graph_config.model_copy(update={"n_max": n}))
    with pytest.raises(ConfigError, match=r"; lower it or raise graph\.n_max$"):
        find(cut, n_nodes=n + 1)


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_the_smallest_circuit_keeps_its_target(searched: Searched, target: float) -> None:
    result = find(searched, n_nodes=None, method="attribution", target_preservation=target)
    shape = searched.discovery.patched.gate_shape
    wanted = target * searched.selection.full().accuracy

    def kept(circuit: Circuit) -> bool:
        return searched.selection.outcome(circuit.gates(shape)).accuracy >= wanted

    assert kept(result.circuit) and result.size < searched.graph.n_candidates
    assert result.steps[0].name == "size"
    # Just below it, within the resolution of the bisection, the target is missed.
    below = range(result.size - max(1, result.size // 20), result.size)
    ranking = searched.graph.flat[np.argsort(-by_attribution(searched.graph), kind="stable")]
    assert result.size == 1 or not all(kept(Circuit(np.sort(ranking[:size]))) for size in below)


def test_a_target_that_nothing_keeps_is_a_warning(searched: Searched, caplog: pytest.LogCaptureFixture) -> None:
    # A tenth of the candidates cannot do the whole task.
    flat = searched.graph.flat[: searched.graph.n_candidates // 10]
    graph = first_features(searched.graph, len(flat))
    few = replace(searched, graph=graph)
    result = find(few, n_nodes=None, method="attribution", sizes=(), target_preservation=1.0)
    assert result.size == len(flat) and "no size keeps the target" in result.steps[0].note
    assert "not even all" in caplog.text and "search.target_preservation=1" in caplog.text


def first_features(graph: AttributionGraph, n: int) -> AttributionGraph:
    keep = np.concatenate([np.arange(n), np.flatnonzero(graph.nodes.kind != FEATURE)])
    nodes = replace(graph.nodes, **{name: value[keep] for name, value in vars(graph.nodes).items()})
    empty = np.zeros((2, 0), dtype=graph.edge_index.dtype)
    return replace(graph, nodes=nodes, flat=graph.flat[:n], edge_index=empty, edge_attr=graph.edge_attr[:0])


@pytest.mark.parametrize(("sizes", "least"), [((), 44), ((10, 40), 88)])
def test_a_budget_below_a_round_of_exchanges_is_told_with_the_least_that_is_enough(
    searched: Searched, sizes: tuple[int, ...], least: int
) -> None:
    """A round at 20 nodes: each of them, 20 outsiders, three exchanges and the circuit itself, on all prompts."""
    told = {}
    for budget in (least - 1, least):
        config = SearchConfig(**{**SMALL, "sizes": sizes, "pruning_budget": budget, "gates": False})
        config = config.model_copy(update={"elimination": False})
        result = find_circuit(searched, config, 0)
        told[budget] = not_pruned(result, config, searched.graph.n_candidates, len(searched.discovery))
        changed = result.steps[-1].changed
        assert result.steps[-1].name == "pruning" and (changed == 0) == (budget < least)
    message = f"one round for 20 nodes costs 44 evaluations, search.pruning_budget={least - 1} leaves "
    assert told[least] is None and message in told[least - 1] and f"to at least {least}" in told[least - 1]
    off = config.model_copy(update={"pruning": False, "pruning_budget": 1})
    assert not_pruned(result, off, searched.graph.n_candidates, len(searched.discovery)) is None

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hagd.config.stages import HierarchyConfig
from hagd.errors import ArtifactError
from hagd.hierarchy.partition import build_hierarchy
from hagd.hierarchy.records import Hierarchy, Level, nodes_key
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.search.traversal import Traversal, find_idle
from tests.search.trained import Trained


def planted(trained: Trained, seed: int = 0) -> tuple[Trained, np.ndarray]:
    """The same model with zero decoder rows for half of layer 0's dictionary, and which candidates those are."""
    old = trained.objective
    first, *rest = old.patched.transcoders.transcoders
    chosen = torch.randperm(old.patched.transcoders.m, generator=torch.Generator().manual_seed(seed))[:32]
    W_dec = first.W_dec.clone()
    W_dec[chosen] = 0
    transcoders = replace(old.patched.transcoders, transcoders=(replace(first, W_dec=W_dec), *rest))
    patched = PatchedModel(old.patched.lm, transcoders, old.patched.means)
    objective = Objective(patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=256)
    nodes = trained.graph.nodes
    n = trained.graph.n_candidates
    idle = (nodes.layer[:n] == 0) & np.isin(nodes.feature[:n], chosen.numpy())
    return Trained(objective, trained.graph), idle


def levels(trained: Trained, *supernodes: np.ndarray) -> Hierarchy:
    built = [Level(np.unique(s, return_inverse=True)[1].astype(np.int64), len(set(s)), 0, 0, 0) for s in supernodes]
    return Hierarchy(8, tuple(built), nodes_key(trained.graph))


def traverse(trained: Trained, hierarchy: Hierarchy, *, budget: float = 1000, tolerance: float = 0.0) -> Traversal:
    return find_idle(
        trained.objective,
        trained.graph,
        hierarchy,
        tolerance=tolerance,
        budget=budget,
        generator=torch.Generator().manual_seed(0),
    )


def pad(trained: Trained, supernode: np.ndarray) -> np.ndarray:
    """Nodes that are no features share a supernode of their own."""
    other = len(trained.graph.nodes) - len(supernode)
    return np.concatenate([supernode, np.full(other, supernode.max() + 1)])


def test_planted_idle_supernodes_are_found_with_few_tests(trained: Trained) -> None:
    model, idle = planted(trained)
    n = len(idle)
    assert 5 < idle.sum() < n / 2
    # Supernodes 0 and 1 are the idle ones, eight more have the rest.
    supernode = np.where(idle, np.arange(n) % 2, 2 + np.arange(n) % 8)
    before = model.objective.patched.evaluations
    found = traverse(model, levels(model, pad(model, supernode)), tolerance=1e-4)
    tests = (model.objective.patched.evaluations - before) / len(model.objective)
    assert found.idle[idle].all(), "all that is planted"
    assert found.tested == 10 and found.levels == 1
    assert tests <= 2 + 10 + 4, "two ends, ten supernodes, bisection"


def test_a_mixed_supernode_is_opened_and_its_idle_half_found_below(trained: Trained) -> None:
    model, idle = planted(trained)
    n = len(idle)
    coarse = np.arange(n) % 2  # both mixed
    fine = 2 * coarse + idle
    found = traverse(model, levels(model, pad(model, coarse), pad(model, fine)), tolerance=1e-4)
    assert found.levels == 2 and found.tested == 2 + 4
    assert np.array_equal(found.idle, idle)


def test_a_hierarchy_of_another_graph_is_refused_with_both_keys(trained: Trained) -> None:
    nodes = trained.graph.nodes
    shifted = replace(trained.graph, nodes=replace(nodes, feature=nodes.feature + 1))
    hierarchy = build_hierarchy(shifted, HierarchyConfig(), seed=0)
    with pytest.raises(ArtifactError, match=f"key {nodes_key(trained.graph)}, .* key {nodes_key(shifted)}"):
        traverse(trained, hierarchy)


def test_what_is_idle_is_not_tested_again(trained: Trained) -> None:
    model, idle = planted(trained)
    n = len(idle)
    coarse = np.where(idle, 0, 1)
    fine = np.where(idle, np.arange(n) % 4, 4 + np.arange(n) % 3)
    found = traverse(model, levels(model, pad(model, coarse), pad(model, fine)), tolerance=1e-4)
    assert found.tested == 2 + 3


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5])
def test_all_idle_nodes_together_stay_within_the_tolerance(trained: Trained, tolerance: float) -> None:
    hierarchy = build_hierarchy(trained.graph, HierarchyConfig(), seed=0)
    found = traverse(trained, hierarchy, tolerance=tolerance)
    n = trained.graph.n_candidates
    empty = trained.divergence(torch.empty(0, dtype=torch.long))
    full = trained.divergence(torch.arange(n))
    kept = trained.divergence(torch.as_tensor(np.flatnonzero(~found.idle)))
    assert kept <= full + tolerance * (empty - full) + 1e-6
    assert not found.idle.all()
    if tolerance > 0:
        assert found.idle.sum() > n / 10


def test_more_tolerance_finds_more(trained: Trained) -> None:
    hierarchy = build_hierarchy(trained.graph, HierarchyConfig(), seed=0)
    counts = [int(traverse(trained, hierarchy, tolerance=t).idle.sum()) for t in (0.01, 0.1, 0.6)]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("budget", [0, 1, 2, 10, 30, 100, 1000])
def test_the_budget_is_kept(trained: Trained, budget: float) -> None:
    hierarchy = build_hierarchy(trained.graph, HierarchyConfig(), seed=0)
    before = trained.objective.patched.evaluations
    found = traverse(trained, hierarchy, budget=budget, tolerance=0.1)
    spent = (trained.objective.patched.evaluations - before) / len(trained.objective)
    assert spent <= budget
    assert (found.levels == 0) == (budget < 10)
    if budget == 1000:
        assert found.levels == len(hierarchy.levels)


@pytest.mark.parametrize("budget", [2, 3, 10, 30, 51])
def test_the_budget_includes_what_the_loss_is_relative_to(trained: Trained, budget: float) -> None:
    old = trained.objective
    objective = Objective(
        old.patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=256, loss="both"
    )
    assert objective.unmeasured == 1
    hierarchy = build_hierarchy(trained.graph, HierarchyConfig(), seed=0)
    before = old.patched.evaluations
    found = traverse(Trained(objective, trained.graph), hierarchy, budget=budget, tolerance=0.1)
    spent = (old.patched.evaluations - before) / len(objective)
    assert spent <= budget and (spent > 0) == (budget >= 3)
    assert objective.unmeasured == (budget < 3) and (found.levels > 0) == (budget >= 10)


def test_gates_of_many_supernodes_are_made_some_at_a_time(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    old = trained.objective
    objective = Objective(old.patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=40)
    losses, made = Objective.losses, []

    def counted(self: Objective, gates: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        made.append(len(gates))
        return losses(self, gates, index)

    monkeypatch.setattr(Objective, "losses", counted)
    small = levels(trained, pad(trained, np.arange(trained.graph.n_candidates) // 4))
    found = traverse(Trained(objective, trained.graph), small, tolerance=0.1)
    assert found.tested > 40 and max(made) == 4
    monkeypatch.undo()
    assert np.array_equal(found.idle, traverse(trained, small, tolerance=0.1).idle)


def test_the_same_generator_finds_the_same(trained: Trained) -> None:
    hierarchy = build_hierarchy(trained.graph, HierarchyConfig(), seed=0)
    one, other = (traverse(trained, hierarchy, tolerance=0.1) for _ in range(2))
    assert np.array_equal(one.idle, other.idle) and one.tested == other.tested

from __future__ import annotations

import numpy as np
import pytest
import torch

from hagd.search.pruning import Exchange, exchange_idle
from tests.search.trained import Trained

ALL = 10_000
"""More prompts than there are: every test reads the whole split."""


def exchange(
    trained: Trained, members: np.ndarray, *, budget: float, prompts: int = ALL, ranking: np.ndarray | None = None
) -> Exchange:
    if ranking is None:
        ranking = np.argsort(-trained.graph.nodes.importance[: trained.graph.n_candidates])
    return exchange_idle(
        trained.objective,
        trained.flat,
        members,
        ranking,
        budget=budget,
        prompts=prompts,
        generator=torch.Generator().manual_seed(0),
    )


def random_members(trained: Trained, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(trained.graph.n_candidates)[:size]


@pytest.mark.parametrize("size", [8, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_bad_circuit_becomes_better_at_its_size(trained: Trained, size: int, seed: int) -> None:
    members = random_members(trained, size, seed)
    kept = members.copy()
    found = exchange(trained, members, budget=500)
    assert np.array_equal(members, kept), "the argument is not changed"
    assert len(found.members) == len(set(found.members.tolist())) == size
    assert found.members.min() >= 0 and found.members.max() < trained.graph.n_candidates
    before, after = (trained.divergence(torch.as_tensor(each)) for each in (members, found.members))
    assert after < 0.9 * before
    assert found.exchanged >= len(set(found.members.tolist()) - set(members.tolist())) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0, 70, 200])
def test_the_divergence_never_rises(trained: Trained, seed: int, budget: float) -> None:
    """On the prompts of the tests, also when the ranking is useless."""
    members = random_members(trained, 20, seed)
    ranking = random_members(trained, trained.graph.n_candidates, seed + 100)
    found = exchange(trained, members, budget=budget, ranking=ranking)
    before, after = (trained.divergence(torch.as_tensor(each)) for each in (members, found.members))
    assert after <= before + 1e-6
    if set(found.members.tolist()) != set(members.tolist()):
        assert after < before


@pytest.mark.parametrize(("budget", "prompts"), [(0, ALL), (6, 5), (20, 10), (60, ALL), (200, ALL)])
def test_the_budget_is_kept(trained: Trained, budget: float, prompts: int) -> None:
    before = trained.objective.patched.evaluations
    found = exchange(trained, random_members(trained, 20, 0), budget=budget, prompts=prompts)
    spent = (trained.objective.patched.evaluations - before) / len(trained.objective)
    assert spent <= budget and (spent > 0) == (budget > 0)
    assert len(found.members) == 20


def test_members_that_do_nothing_leave_first(trained: Trained) -> None:
    """A good circuit of which some members were replaced by features that write nothing gets good ones back."""
    n = trained.graph.n_candidates
    importance = trained.graph.nodes.importance[:n]
    ranking = np.argsort(-importance, kind="stable")
    useless = ranking[-4:]
    members = np.concatenate([ranking[4:20], useless])
    found = exchange(trained, members, budget=1000)
    assert found.exchanged >= 1
    assert trained.divergence(torch.as_tensor(found.members)) < trained.divergence(torch.as_tensor(members))
    assert set(useless.tolist()) - set(found.members.tolist())


def test_when_every_candidate_is_inside_nothing_happens(trained: Trained) -> None:
    everything = np.arange(trained.graph.n_candidates)
    assert exchange(trained, everything, budget=1000).exchanged == 0

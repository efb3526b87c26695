from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hagd.patching.objective import Objective
from hagd.search.elimination import contributions, eliminate
from tests.search.trained import Trained


@pytest.fixture(
    scope="module",
    params=["both", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("shortfall", "divergence"))],
)
def objective(request: pytest.FixtureRequest, trained: Trained) -> Objective:
    old = trained.objective
    return Objective(
        old.patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=15, loss=request.param
    )


def ranking(objective: Objective, trained: Trained, sizes: tuple[int, ...] = (10, 30), **changes: object) -> np.ndarray:
    n = trained.graph.n_candidates
    start = trained.graph.nodes.importance[:n]
    settings = {"n_start": n, "keep": 0.8, "steps": 2, "prompts": 20, **changes}
    generator = torch.Generator().manual_seed(0)
    return eliminate(objective, trained.flat, start, sizes, generator=generator, **settings)  # type: ignore[arg-type]


def test_contributions_are_the_equation_prompt_by_prompt(objective: Objective, trained: Trained) -> None:
    flat, steps = trained.flat[:12], 2
    index = torch.tensor([3, 0, 17, 5, *range(20, 33)])  # two batches
    found = contributions(objective, flat, index, steps)
    expected = np.zeros(12)
    for prompt in index:
        contributed = torch.zeros(12)
        for step in range(steps):
            gates = torch.zeros(math.prod(objective.patched.gate_shape))
            gates[flat] = (step + 0.5) / steps
            gates = gates.view(objective.patched.gate_shape).requires_grad_()
            objective.loss(gates, prompt[None]).backward()
            assert gates.grad is not None
            contributed -= gates.grad.flatten()[flat] / steps
        expected += contributed.clamp(min=0).numpy() / len(index)
    assert (expected > 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max())


def test_a_ranking_of_all_candidates(objective: Objective, trained: Trained) -> None:
    n = trained.graph.n_candidates
    found = ranking(objective, trained)
    assert sorted(found) == list(range(n))
    again = ranking(objective, trained)
    assert np.array_equal(found, again)
    worst = np.argsort(trained.graph.nodes.importance[:n], kind="stable")[: n - 40]
    fewer = ranking(objective, trained, n_start=40)
    assert np.array_equal(np.argsort(fewer)[: n - 40], worst), "what the first round does not begin with is last"


@pytest.mark.parametrize("sizes", [(10, 30), (1,), (10_000,), ()])
def test_rounds_stop_at_every_size(trained: Trained, sizes: tuple[int, ...]) -> None:
    seen: list[tuple[int, int]] = []
    n = trained.graph.n_candidates
    before = trained.objective.patched.evaluations
    ranking(trained.objective, trained, sizes, progress=lambda done, total: seen.append((done, total)), prompts=4)
    spent = trained.objective.patched.evaluations - before
    rounds = len(seen)
    assert seen == [(i + 1, rounds) for i in range(rounds)]
    assert spent == rounds * 4 * 2 * 3, "prompts × points × forward and backward"
    reached = [size for size in sizes if size < n]
    if reached:
        assert rounds <= math.log(n / min(reached)) / math.log(1 / 0.8) + len(reached) + min(reached) + 10
    assert bool(rounds) == bool(reached)


def test_the_last_round_attributes_within_what_is_left(objective: Objective, trained: Trained) -> None:
    """One round by hand: its least contributing nodes are dropped first."""
    n = trained.graph.n_candidates
    found = ranking(objective, trained, (n - 5,), keep=0.99, steps=3, prompts=40)
    alone = contributions(objective, trained.flat, torch.arange(40), 3)
    start = np.argsort(trained.graph.nodes.importance[:n], kind="stable")
    assert np.array_equal(np.argsort(found)[-5:], start[np.argsort(alone[start], kind="stable")][-5:])


def test_circuits_are_better_than_those_of_one_attribution(objective: Objective, trained: Trained) -> None:
    n = trained.graph.n_candidates
    found = ranking(objective, trained, (10, 20, 40), steps=4, prompts=40)
    once = trained.graph.nodes.importance[:n]

    def losses(score: np.ndarray) -> list[float]:
        best = np.argsort(-score, kind="stable")
        gates = torch.zeros(3, math.prod(objective.patched.gate_shape))
        for row, size in zip(gates, (10, 20, 40), strict=True):
            row[trained.flat[best[:size]]] = 1
        return objective.losses(gates.view(3, *objective.patched.gate_shape), torch.arange(40)).tolist()

    ours, theirs = losses(found), losses(once)
    assert sum(ours) < sum(theirs)
    assert all(small > large for small, large in pairwise(ours))
